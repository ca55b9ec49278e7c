"""Classifiers that give every pixel of a patch a class, from the patch's feature: their interface and measurement."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..evaluation.embed import Execution
from .patches import PatchEncoder, SquashedImages, encode
from .scores import Confusion, Measured


class PixelClassifier(ABC):
    """Fitted to the patches of training images."""

    name: str
    """The name of its row in a table."""
    protocol: dict[str, Any]
    """Everything that is needed to repeat the measurement, as plain JSON values."""

    @abstractmethod
    def predict(self, features: Tensor) -> Tensor:
        """The class of each pixel (n, p * p) int64, from the features (n, dim) of patches."""


class Standardise:
    """Features minus their mean over the training patches, divided by their standard deviation."""

    def __init__(self, train: Tensor):
        self._mean, self._scale = train.mean(0), train.std(0) + 1e-6

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self._mean) / self._scale


def mean_iou(predicted: Tensor, truth: Tensor, classes: int) -> float:
    """Mean IoU of predicted classes against true ones, of the same shape."""
    confusion = Confusion(classes, str(truth.device))
    confusion.add(truth, predicted)
    return confusion.scores().mean_iou


def measure(
    fitted: Sequence[tuple[PatchEncoder, Sequence[PixelClassifier]]],
    squashed: SquashedImages,
    classes: int,
    shown: Collection[str],
    execution: Execution,
) -> list[Measured]:
    """Measures the classifiers of each encoder on validation images, in one pass; `shown` are keys whose predictions
    are kept.

    Raises DataError for an image or a mask that cannot be read.
    """
    rows = [
        _Row(encoder.name, classifier, Confusion(classes, execution.device))
        for encoder, of in fitted
        for classifier in of
    ]
    for images, pixels, blocks in squashed.batches(execution):
        truth, measured = blocks.to(execution.device), iter(rows)
        for encoder, classifiers in fitted:
            features = encode(encoder, images, pixels)
            for _ in classifiers:
                next(measured).add([pair.image.key for pair in images], features, truth, shown)
    return [row.finish(len(squashed.images)) for row in rows]


class _Row:
    """One classifier on one encoder's features."""

    def __init__(self, features: str, classifier: PixelClassifier, confusion: Confusion):
        self._features, self._classifier, self._confusion = features, classifier, confusion
        self._maps: dict[str, NDArray[np.int16]] = {}

    def add(self, keys: Sequence[str], features: Tensor, truth: Tensor, shown: Collection[str]) -> None:
        """Adds images with features (B, N, dim) and true classes (B, N, p * p)."""
        predicted = self._classifier.predict(features.flatten(0, 1)).view(truth.shape)
        self._confusion.add(truth, predicted)
        self._maps |= {key: _assembled(one) for key, one in zip(keys, predicted, strict=True) if key in shown}

    def finish(self, images: int) -> Measured:
        protocol = {**self._classifier.protocol, "val_images": images}
        return Measured(self._features, self._classifier.name, protocol, self._confusion.scores(), self._maps)


def _assembled(blocks: Tensor) -> NDArray[np.int16]:
    """The map (S, S) of the blocks (N, p * p) of an image's patches."""
    grid, side = round(len(blocks) ** 0.5), round(blocks.shape[1] ** 0.5)
    return (
        blocks.view(grid, grid, side, side)
        .transpose(1, 2)
        .reshape(grid * side, grid * side)
        .cpu()
        .numpy()
        .astype(np.int16)
    )
