"""k-CLIP and every other k-means tokenizer: patch features of a frozen tower, and the nearest centroid of each."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...shared.artifacts.codes import Tokens
from ...shared.errors import FingerprintMismatch
from ...shared.tokens.codebook import INNER_PRODUCT, TOKEN_FIELDS, Codebook
from ..towers.opening import open_tower
from ..towers.tower import Tower, TowerSettings
from .base import Tokenizer, pixels_in_255

_MOST_SCORES = 1 << 27
"""Scores of patches and centroids that are computed at once: 512 MiB of float32."""

# Another device or batch size rounds features differently: two centroids whose squared distances differ by no more
# than this share of the squared lengths are equally near.
_ROUNDING = {"float32": 1e-5, "bfloat16": 1e-2}


class NearestCode(Tokenizer):
    """The nearest centroid of each patch feature: by Euclidean distance or cosine (arXiv 2306.07346, section 3), or the
    largest inner product plus bias."""

    def __init__(self, tower: Tower, codebook: Codebook, description: dict[str, Any]):
        """`description` is the JSON of the codebook's folder (`shared.tokens.codebook.read_description`)."""
        self.tower, self.codebook, self.description = tower, codebook, description
        self.preprocess, self.grid, self.dim, self.device = tower.preprocess, tower.grid, tower.dim, tower.device
        self.k, self.fingerprint = codebook.k, codebook.fingerprint
        self.unit_length = codebook.description["metric"] == "cosine"
        architecture: Any = tower.identity["architecture"]
        self.stride = architecture.get("stride")

    def features(self, pixels: Tensor) -> Tensor:
        return self.tower.features(pixels_in_255(pixels))

    def assign(self, features: NDArray[np.float32]) -> tuple[Tokens, NDArray[np.float32]]:
        return self.codebook.assign(features)

    def tokens(self, features: Tensor) -> Tensor:
        if features.device.type == "cpu":
            return super().tokens(features)  # FAISS
        return tokens_by_products(features, *self._on_device)

    @cached_property
    def _on_device(self) -> tuple[Tensor, Tensor]:
        """`codes_for_products` on `device`."""
        centroids, offsets = codes_for_products(self.codebook)
        return centroids.to(self.device), offsets.to(self.device)

    def nearly_equal(self, features: NDArray[np.float32], tokens: Tokens, nearest: Tokens) -> NDArray[np.bool_]:
        points, centroids = features.astype(np.float64), self.codebook.centroids.astype(np.float64)
        rounding = _ROUNDING[self.codebook.description["precision"]]
        if self.codebook.description["metric"] == INNER_PRODUCT:
            bias = self.codebook.bias_or_zeros.astype(np.float64)
            low, high = ((points * centroids[codes]).sum(-1) + bias[codes] for codes in (tokens, nearest))
            lengths = np.linalg.norm(points, axis=-1) * np.linalg.norm(centroids[nearest], axis=-1)
            close: NDArray[np.bool_] = high - low <= rounding * (lengths + abs(bias[nearest]))
            return close
        far, near = (((points - centroids[codes]) ** 2).sum(-1) for codes in (tokens, nearest))
        scale = (points**2).sum(-1) + (centroids[nearest] ** 2).sum(-1)
        ties: NDArray[np.bool_] = far - near <= rounding * scale
        return ties


def codes_for_products(codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Centroids (K, dim) and offsets (K,), both float32, for which a feature's token is the number of the largest of
    `centroids @ feature + offsets`."""
    centroids = torch.from_numpy(np.ascontiguousarray(codebook.centroids))
    if codebook.description["metric"] != INNER_PRODUCT:
        # |x - c|^2 is smallest where x.c - |c|^2 / 2 is largest.
        return centroids, (-0.5 * centroids.double().square().sum(1)).float()
    return centroids, torch.from_numpy(codebook.bias_or_zeros)


def tokens_by_products(features: Tensor, centroids: Tensor, offsets: Tensor) -> Tensor:
    """The exact search for the nearest centroid as matrix products in float32, on the device of its arguments.

    Args:
        features: (n, dim) float32.
        centroids, offsets: (K, dim) and (K,) float32 (`codes_for_products`).

    Returns:
        (n,) int64; the lowest of several centroids that are equally near.
    """
    at_once = max(1, _MOST_SCORES // len(centroids))
    parts = [torch.addmm(offsets, part, centroids.T).argmax(1) for part in torch.split(features, at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def open_same_tower(codebook: Codebook, tower: str | None, device: str) -> Tower:
    """Opens the codebook's tower where it was, or at `tower`. Raises FingerprintMismatch if that is another tower."""
    recorded = codebook.description
    settings = TowerSettings(**{name: recorded[name] for name in TowerSettings.__dataclass_fields__})
    opened = open_tower(replace(settings, tower=tower) if tower else settings, device)
    for name, value in opened.description().items():
        if name in TOKEN_FIELDS and value != recorded[name]:
            raise FingerprintMismatch(
                f"--tower {opened.settings.tower} is not the tower of the codebook: its {name} is {value}, "
                f"the codebook's {recorded[name]}."
            )
    return opened
