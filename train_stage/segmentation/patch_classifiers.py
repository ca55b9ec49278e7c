"""Classifiers of patches: logistic regression, and k nearest neighbours that vote with their blocks of pixels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..masked.masks import IGNORED
from ..probing.linear_probe import LinearClassifier, logistic_regression
from .patches import PatchSet, most_frequent
from .pixel_classifier import PixelClassifier, Standardise, mean_iou

STRENGTHS = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 8))
"""Values of C, the inverse strength of regularisation, of CAPI's segmentation (arXiv 2502.08769)."""
NEIGHBOURS = (1, 3, 10, 30)
METRICS = ("cosine", "l2")
_MOST_SIMILARITIES = 1 << 26
"""How many similarities are in memory at once."""
FITS = len(STRENGTHS) + 1 + len(METRICS) * len(NEIGHBOURS)
"""How often both classifiers together call `advance`."""


class PatchRegression(PixelClassifier):
    """Multinomial logistic regression from a patch to its most frequent class, which all its pixels get.

    It minimises C * (sum of the cross-entropies) + |weight|^2 / 2, as scikit-learn's LogisticRegression does.
    """

    name = "logistic regression"

    def __init__(self, train: PatchSet, advance: Callable[[int], Any]):
        """Chooses C on the held-out patches, then fits all patches."""
        self._standardise = Standardise(train.features)
        self._side = train.blocks.shape[1]
        features = self._standardise(train.features)
        fit, choose = ~train.held_out, train.held_out
        scores: dict[float, float] = {}
        fits: dict[float, LinearClassifier] = {}
        self._classifier = _zeros(features, train.classes)
        # Each fit starts from the one before, which was regularised more strongly.
        for strength in STRENGTHS:
            self._classifier = _fit(features[fit], train.labels[fit], strength, self._classifier)
            fits[strength] = self._classifier
            scores[strength] = mean_iou(self._predicted(features[choose]), train.blocks[choose], train.classes)
            advance(1)
        chosen = max(scores, key=scores.__getitem__)
        self._classifier = _fit(features, train.labels, chosen, fits[chosen])
        advance(1)
        self.protocol = {
            "classifier": "multinomial logistic regression from a patch to its most frequent class (the lowest of "
            "several), spread over its pixels",
            "optimizer": "L-BFGS, strong Wolfe line search, at most 100 iterations",
            "strengths": list(STRENGTHS),
            "strength": chosen,
            **train.protocol,
        }

    def predict(self, features: Tensor) -> Tensor:
        return self._predicted(self._standardise(features))

    def _predicted(self, features: Tensor) -> Tensor:
        classes = (features @ self._classifier.weight + self._classifier.bias).argmax(1)
        return classes[:, None].expand(-1, self._side)


def _zeros(features: Tensor, classes: int) -> LinearClassifier:
    return LinearClassifier(features.new_zeros(features.shape[1], classes), features.new_zeros(classes))


def _fit(features: Tensor, labels: Tensor, strength: float, start: LinearClassifier) -> LinearClassifier:
    """The classifier for one value of C; the mean cross-entropy has weight decay 1 / (C n)."""
    with torch.enable_grad():
        return logistic_regression(features, labels, 1 / (strength * len(features)), start)


class PatchNeighbours(PixelClassifier):
    """For each pixel of a patch, the most frequent class of the pixels at its place in the k nearest training patches.

    Where all of these are ignored, the pixel gets the most frequent class of the nearest patch (as in CAPI, arXiv
    2502.08769, k and metric are chosen).
    """

    name = "k-NN"

    def __init__(self, train: PatchSet, advance: Callable[[int], Any]):
        """Chooses k and metric on the held-out patches; all patches are neighbours afterwards."""
        self._standardise = Standardise(train.features)
        choose = train.only(train.held_out)
        scores: dict[tuple[int, str], float] = {}
        for metric in METRICS:
            self._use(train.only(~train.held_out), metric)
            nearest = self._nearest(choose.features, max(NEIGHBOURS))
            for k in NEIGHBOURS:
                scores[k, metric] = mean_iou(self._votes(nearest[:, :k]), choose.blocks, train.classes)
                advance(1)
        self._k, metric = max(scores, key=scores.__getitem__)
        self._use(train, metric)
        self.protocol = {
            "classifier": "k-NN of standardised features; each neighbour votes with its block of pixels, and of "
            "several classes with most votes the lowest wins",
            "neighbours": list(NEIGHBOURS),
            "metrics": list(METRICS),
            "k": self._k,
            "metric": metric,
            **train.protocol,
        }

    def predict(self, features: Tensor) -> Tensor:
        return self._votes(self._nearest(features, self._k))

    def _use(self, train: PatchSet, metric: str) -> None:
        self._train, self._metric = train, metric
        self._bank = self._scaled(train.features)
        # The nearest by l2 are those with the largest q.b - |b|^2 / 2.
        self._offset = self._bank.square().sum(1) / -2 if metric == "l2" else self._bank.new_zeros(len(self._bank))

    def _scaled(self, features: Tensor) -> Tensor:
        standard = self._standardise(features)
        return normalize(standard, dim=1) if self._metric == "cosine" else standard

    def _nearest(self, features: Tensor, k: int) -> Tensor:
        """Indices (n, k) of the nearest training patches, nearest first; of all, if there are fewer than k."""
        queries = torch.split(self._scaled(features), max(1, _MOST_SIMILARITIES // len(self._bank)))
        k = min(k, len(self._bank))
        return torch.cat([torch.addmm(self._offset, part, self._bank.T).topk(k, dim=1).indices for part in queries])

    def _votes(self, nearest: Tensor) -> Tensor:
        """The winner for each pixel, (n, p * p) int64, of the blocks of the nearest patches (n, k)."""
        step = max(1, _MOST_SIMILARITIES // (nearest.shape[1] * self._train.blocks.shape[1]))
        winners = [
            most_frequent(self._train.blocks[part].transpose(1, 2), self._train.classes)
            for part in torch.split(nearest, step)
        ]
        voted = torch.cat(winners)
        return torch.where(voted == IGNORED, self._train.labels[nearest[:, :1]], voted)
