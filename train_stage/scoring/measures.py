"""What logits achieve: accuracy, calibration, and which classes are taken for which."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15
"""Bins of confidence for the calibration error, of equal width (Guo et al. 2017, arXiv 1706.04599)."""
_ROWS = 4096
"""Images whose probabilities are in memory at a time."""


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose confidence, the probability of the predicted class, lies in [low, high), or [low, high] in the
    last bin."""

    low: float
    high: float
    images: int
    confidence: float
    """Its mean; 0 without images."""
    accuracy: float
    """Share of the images that are predicted correctly; 0 without images."""


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy on the images of one class."""

    name: str
    images: int
    top1: float
    top5: float
    confused_with: str | None
    """The class that most of its wrongly predicted images are taken for; None without any."""
    confused_images: int
    """How many of them."""


@dataclass(frozen=True)
class Confusion:
    """How many images of a class are taken for another one."""

    name: str
    predicted: str
    images: int


class Scores:
    """Logits (n, C) of n images among C outputs, measured against their classes (n,)."""

    def __init__(self, logits: Tensor, targets: Tensor, names: Sequence[str]) -> None:
        """`targets` are positions in `names`, the names of the outputs; n and C are at least 1."""
        self.targets, self.names = targets, names
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        self.predicted = ranked[:, 0]
        """(n,) int64."""
        self.right = self.predicted == targets
        """(n,) bool."""
        self._right5 = (ranked == targets[:, None]).any(1)
        parts = list(_probabilities(logits, targets, self.predicted))
        self.confidence, self._losses, self._briers = (torch.cat(column) for column in zip(*parts, strict=True))

    def numbers(self) -> dict[str, float]:
        """Accuracies and the expected calibration error in [0, 1], the mean cross-entropy in nats, the Brier score in
        [0, 2]."""
        return {
            "top1": self.right.double().mean().item(),
            "top5": self._right5.double().mean().item(),
            "ece": sum(bin.images * abs(bin.confidence - bin.accuracy) for bin in self.bins()) / len(self.targets),
            "nll": self._losses.mean().item(),
            "brier": self._briers.mean().item(),
        }

    def bins(self) -> list[CalibrationBin]:
        """The reliability of the predictions, `BINS` bins of confidence."""
        places = (self.confidence * BINS).long().clamp(max=BINS - 1)
        counts = places.bincount(minlength=BINS)
        confidences, accuracies = (
            torch.bincount(places, values.double(), minlength=BINS) / counts.clamp(min=1)
            for values in (self.confidence, self.right)
        )
        columns = zip(counts.tolist(), confidences.tolist(), accuracies.tolist(), strict=True)
        return [CalibrationBin(at / BINS, (at + 1) / BINS, *column) for at, column in enumerate(columns)]

    def by_class(self) -> list[ClassAccuracy]:
        """The accuracy on each class that has images, in the order of the outputs."""
        size = len(self.names)
        images = self.targets.bincount(minlength=size)
        top1, top5 = (
            torch.bincount(self.targets, right.double(), minlength=size) / images.clamp(min=1)
            for right in (self.right, self._right5)
        )
        most = {confusion.name: confusion for confusion in reversed(self.confusions())}
        listed = []
        for at in images.nonzero()[:, 0].tolist():
            name, worst = self.names[at], most.get(self.names[at])
            confused = (worst.predicted, worst.images) if worst else (None, 0)
            listed.append(ClassAccuracy(name, int(images[at]), float(top1[at]), float(top5[at]), *confused))
        return listed

    def confusions(self) -> list[Confusion]:
        """Every pair of different classes that occurs, the most frequent first, then in the order of the outputs."""
        size = len(self.names)
        pairs, counts = torch.unique((self.targets * size + self.predicted)[~self.right], return_counts=True)
        order = counts.argsort(descending=True, stable=True).tolist()
        return [
            Confusion(self.names[pair // size], self.names[pair % size], count)
            for pair, count in ((int(pairs[at]), int(counts[at])) for at in order)
        ]

    def matrix(self) -> Tensor:
        """(C, C) int64: images by class (row) and predicted class (column)."""
        size = len(self.names)
        return (self.targets * size + self.predicted).bincount(minlength=size * size).view(size, size)


def _probabilities(logits: Tensor, targets: Tensor, predicted: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Confidence, cross-entropy and Brier score of each image, float64, a part of the images at a time."""
    columns = [torch.split(tensor, _ROWS) for tensor in (logits, targets, predicted)]
    for part, of_part, guesses in zip(*columns, strict=True):
        logs = part.double().log_softmax(1)
        loss = -logs.gather(1, of_part[:, None])[:, 0]
        probabilities = logs.exp()
        brier = probabilities.square().sum(1) - 2 * (-loss).exp() + 1  # sum over outputs of (p - y)^2
        yield probabilities.gather(1, guesses[:, None])[:, 0], loss, brier
