"""What logits achieve: accuracy, calibration, and which classes are taken for which."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

BINS = 15
"""Bins of confidence for the calibration error, of equal width (Guo et al. 2017)."""


def top_k(logits: Tensor, classes: Tensor, k: int) -> Tensor:
    """(n,) bool: whether the class is among the k largest logits; all of them if there are fewer."""
    return (logits.topk(min(k, logits.shape[1]), dim=1).indices == classes[:, None]).any(1)


def loss_of(logits: Tensor, classes: Tensor) -> float:
    """The mean cross-entropy in nats."""
    return cross_entropy(logits, classes).item()


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose confidence lies in one bin."""

    images: int
    confidence: float
    """Mean probability of the predicted class; 0 without images."""
    accuracy: float


def calibration(logits: Tensor, classes: Tensor) -> tuple[float, list[CalibrationBin]]:
    """The expected calibration error in [0, 1], and its bins: the mean difference between confidence and accuracy."""
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == classes).double()
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    bins, error = [], 0.0
    for number in range(BINS):
        inside = place == number
        count = int(inside.sum())
        mean, accuracy = (float(values[inside].mean()) if count else 0.0 for values in (confidence, right))
        bins.append(CalibrationBin(count, mean, accuracy))
        error += count / len(classes) * abs(mean - accuracy)
    return error, bins


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy on the images of one class."""

    name: str
    images: int
    top1: float
    top5: float


def per_class(logits: Tensor, classes: Tensor, names: Sequence[str]) -> list[ClassAccuracy]:
    """The accuracies of each class that has images, in the order of the outputs."""
    first, fifth = top_k(logits, classes, 1).double(), top_k(logits, classes, 5).double()
    counts = classes.bincount(minlength=len(names))
    sums = [torch.zeros(len(names), dtype=torch.float64).index_add_(0, classes, right) for right in (first, fifth)]
    return [
        ClassAccuracy(name, int(counts[at]), float(sums[0][at] / counts[at]), float(sums[1][at] / counts[at]))
        for at, name in enumerate(names)
        if counts[at]
    ]


def confusions(logits: Tensor, classes: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """(class, predicted, images) of every pair of different classes that occurs, the most frequent first."""
    pairs = classes * len(names) + logits.argmax(1)
    found, counts = pairs[classes != logits.argmax(1)].unique(return_counts=True)
    listed = [
        {"class": names[int(pair) // len(names)], "predicted": names[int(pair) % len(names)], "images": int(count)}
        for pair, count in zip(found, counts, strict=True)
    ]
    return sorted(listed, key=lambda pair: -pair["images"])
