"""How well codes stand for features: the error of a patch's centroid, or the probability of its code."""

from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from ...shared.tokens.codebook import INNER_PRODUCT
from ..tokenizers.base import Tokenizer
from ..tokenizers.nearest_code import NearestCode

_WITH_DISTANCE = ("l2", "cosine")
_LOGITS_AT_ONCE = 1 << 24


class Reconstruction(TypedDict):
    """What is lost when a patch's feature is replaced by its code, over the patches of the sample."""

    error: float | None
    """Mean squared distance of a feature to its centroid / total variance of the features: 1 - explained variance. 0 is
    lossless, 1 is no better than one code for all. With metric cosine, and for VQ-KD, features have length one."""
    log2_probability: float | None
    """Where no distance exists (inner product plus bias, as in DALL-E's dVAE): mean log2 of the probability of the
    chosen code, by softmax over all K logits; 0 is certain, -log2 K is undecided."""
    reason: str | None
    """Why `error` is None."""


class ReconstructionMeter:
    """Collects the features of patches batch by batch."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.metric = tokenizer.description.get("metric")
        self.patches, self.squared_distance, self.squared_length, self.log2 = 0, 0.0, 0.0, 0.0
        self.sum = np.zeros(tokenizer.dim)

    def add(self, features: NDArray[np.float32], distances: NDArray[np.float32]) -> None:
        """Features (n, dim) as `assign` takes them, and the distances (n,) that it returned."""
        wide = features.astype(np.float64)
        self.patches += len(wide)
        self.sum += wide.sum(0)
        self.squared_length += float((wide**2).sum())
        self.squared_distance += float(np.maximum(distances, 0).sum(dtype=np.float64))
        if self.metric == INNER_PRODUCT and isinstance(self.tokenizer, NearestCode):
            self.log2 += _log2_probability(self.tokenizer, features)

    def result(self) -> Reconstruction:
        if self.metric == INNER_PRODUCT:
            reason = "the metric is an inner product with a bias, which has no distance"
            return {"error": None, "log2_probability": self.log2 / max(self.patches, 1), "reason": reason}
        if self.metric not in _WITH_DISTANCE:
            return {"error": None, "log2_probability": None, "reason": "the tokenizer states no metric with a distance"}
        variance = self.squared_length - float((self.sum**2).sum()) / max(self.patches, 1)
        if variance <= 1e-12 * self.squared_length:
            return {"error": None, "log2_probability": None, "reason": "all features are equal"}
        return {"error": self.squared_distance / variance, "log2_probability": None, "reason": None}


def _log2_probability(tokenizer: NearestCode, features: NDArray[np.float32]) -> float:
    """Sum over patches of the log2 of the largest probability."""
    codebook, total = tokenizer.codebook, 0.0
    codes, bias = torch.from_numpy(codebook.centroids).T, torch.from_numpy(codebook.bias_or_zeros)
    for part in torch.split(torch.from_numpy(features), max(_LOGITS_AT_ONCE // codebook.k, 1)):
        total += float(torch.log_softmax(part @ codes + bias, dim=1).amax(1).double().sum())
    return total / float(np.log(2))
