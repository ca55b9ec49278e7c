"""Mean intersection over union and pixel accuracy, from a confusion matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..masked.masks import IGNORED


class Scores(NamedTuple):
    """The figures of a segmentation."""

    mean_iou: float
    """Mean over the classes that occur in the truth."""
    pixel_accuracy: float
    """Share of the pixels that are right."""
    iou: list[float | None]
    """By class index; None for a class that does not occur in the truth."""


class Confusion:
    """Counts pixels by true and by predicted class."""

    def __init__(self, classes: int, device: str = "cpu"):
        self.matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        """(classes, classes) int64: rows are true classes, columns predicted ones."""

    def add(self, truth: Tensor, predicted: Tensor) -> None:
        """Adds the pixels of which the true class, of any integer dtype, is not `IGNORED`; the shapes are the same."""
        known = truth != IGNORED
        classes = len(self.matrix)
        pairs = truth[known].long() * classes + predicted[known].long()
        self.matrix += torch.bincount(pairs, minlength=classes * classes).view(classes, classes)

    def scores(self) -> Scores:
        """The figures of all pixels so far, of which there is at least one."""
        matrix = self.matrix.double().cpu()
        right, true = matrix.diagonal(), matrix.sum(1)
        union = true + matrix.sum(0) - right
        occurs = true > 0
        iou = (right / union.clamp(min=1)).tolist()
        return Scores(
            (right[occurs] / union[occurs]).mean().item(),
            (right.sum() / true.sum()).item(),
            [value if there else None for value, there in zip(iou, occurs.tolist(), strict=True)],
        )


@dataclass(frozen=True, eq=False)
class Measured:
    """What one segmentation achieves on the validation images."""

    features: str
    """Whose features: "pre-trained" or "random init"."""
    classifier: str
    """What reads them: "logistic regression", "k-NN" or "linear head"."""
    protocol: dict[str, Any]
    scores: Scores
    maps: Mapping[str, NDArray[np.int16]]
    """The predicted classes (height, width) of some validation images, by key, for a page."""
