"""k nearest neighbours on frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ..evaluation.base import EvaluationResult, FrozenEvaluation
from ..evaluation.classes import number_classes
from ..evaluation.embed import FrozenFeatures
from ..evaluation.held_out import HELD_OUT, split_held_out

_CHUNK = 1024
"""How many validation images have their similarities to all training images in memory."""
_MOST_VOTES = 2**27
"""Most float32 numbers that the votes of a part of them take (0.5 GB)."""
KS = (10, 20, 100, 200)
"""The numbers of neighbours that DINOv2 compares."""


@dataclass(frozen=True)
class KNearestNeighbours(FrozenEvaluation):
    """k-NN by cosine of features centred by the training mean (SimpleShot, arXiv 1911.04623), or not centred (DINOv2,
    arXiv 2304.07193).

    The defaults of `k` and `temperature` are DINO's (arXiv 2104.14294).
    """

    k: int = 20
    temperature: float = 0.07
    centred: bool = True
    compared: Sequence[int] = ()
    """Other numbers of neighbours, each of which is measured, too (as "top1_k10"); those that there are not so many
    training images of are left out. The one that does best on held-out training images is "top1_chosen_k"."""

    @property
    def name(self) -> str:
        return "knn" if self.centred else "knn-not-centred"

    def measure(self, features: FrozenFeatures) -> EvaluationResult:
        numbers = {"top1": self._on_val(features, [self.k])[self.k]}
        protocol: dict[str, Any] = {
            "k": min(self.k, len(features.train)),
            "temperature": self.temperature,
            "similarity": f"cosine of features{' centred by the mean of the training features' * self.centred}",
            "vote": "exp(similarity / temperature)",
            "hyper_parameters": "fixed beforehand",
            "features": features.to_json(),
        }
        ks = [k for k in self.compared if k <= len(features.train) * (1 - HELD_OUT)]
        if ks:
            held_out, measured = self._on_held_out(features, ks), self._on_val(features, ks)
            chosen = max(ks, key=held_out.__getitem__)
            numbers |= {f"top1_k{k}": measured[k] for k in ks} | {"top1_chosen_k": measured[chosen]}
            protocol["compared"] = {
                "ks": ks,
                "held_out_top1": [held_out[k] for k in ks],
                "chosen_k": chosen,
                "hyper_parameters": f"chosen on {HELD_OUT:.0%} of the training images, with the others as neighbours; "
                "measured with all of them as neighbours",
            }
        return EvaluationResult(self.name, protocol, numbers)

    def _on_val(self, features: FrozenFeatures, ks: Sequence[int]) -> dict[int, float]:
        return self._accuracies(features.train, features.train_labels, features.val, features.val_labels, ks)

    def _on_held_out(self, features: FrozenFeatures, ks: Sequence[int]) -> dict[int, float]:
        train, labels = features.train, features.train_labels
        choose, fit = split_held_out(len(train), train.device)
        return self._accuracies(train[fit], labels[fit], train[choose], labels[choose], ks)

    def _accuracies(
        self, train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, ks: Sequence[int]
    ) -> dict[int, float]:
        return knn_accuracies(train, labels, test, test_labels, ks, self.temperature, centred=self.centred)


def knn_accuracy(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """`knn_accuracies` for one k, of centred features."""
    return knn_accuracies(train, labels, test, test_labels, [k], temperature)[k]


def knn_accuracies(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    centred: bool = True,
) -> dict[int, float]:
    """Top-1 accuracy, by k, of the weighted vote of the k nearest training images by cosine.

    Args:
        train: (n, dim) float, features of the training images.
        labels: (n,) int64, their classes.
        test: (m, dim) float, features of the images to classify.
        test_labels: (m,) int64, their classes.
        ks: numbers of neighbours; all training images if there are fewer.
        temperature: a neighbour's vote weighs exp(similarity / temperature).
        centred: subtract the mean of the training features from all features.

    Raises:
        DataError for a negative label. Only classes that occur get votes, whatever their numbers.
    """
    mean = train.mean(0) if centred else torch.zeros_like(train[0])
    train, test = (normalize(features - mean, dim=1) for features in (train, test))
    labels, test_labels, classes = number_classes(labels.to(train.device), test_labels.to(train.device))
    one_hot_labels = one_hot(labels, classes).float()
    correct = dict.fromkeys(ks, 0)
    for queries, truth in zip(torch.split(test, _CHUNK), torch.split(test_labels, _CHUNK), strict=True):
        similarities = queries @ train.T
        for k in ks:
            similarity, nearest = similarities.topk(min(k, len(train)), dim=1)
            weights = (similarity / temperature).exp()
            correct[k] += int((_winners(weights, nearest, one_hot_labels) == truth).sum())
    return {k: count / len(test) for k, count in correct.items()}


def _winners(weights: Tensor, nearest: Tensor, one_hot_labels: Tensor) -> Tensor:
    """The class (m,) with most votes, from the weights (m, k) of neighbours and their indices (m, k)."""
    at_once = max(1, _MOST_VOTES // (weights.shape[1] * one_hot_labels.shape[1]))
    parts = zip(torch.split(weights, at_once), torch.split(nearest, at_once), strict=True)
    return torch.cat([(part[:, :, None] * one_hot_labels[of_part]).sum(1).argmax(1) for part, of_part in parts])
