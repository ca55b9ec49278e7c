"""The statistics of a codebook: usage of its codes in training, and distances between its centroids."""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ...shared.runtime.console import progress
from ...shared.tokens.codebook import Codebook
from ..counting.schema import code_statistics

_CLOSEST = 10
_BLOCK = 4096
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


class Distances(TypedDict):
    """Euclidean distances from each centroid to the nearest other one; None for a codebook of one centroid."""

    nearest: dict[str, float]
    """min, p10, median, p90, max and mean."""
    closest: list[list[Any]]
    """[code, code, distance] for the ten closest pairs."""
    twins: int
    """Number of centroids that equal another one."""
    of_a_patch: float | None
    """Root mean square distance of the sample's patches to their centroids, to compare with; None if imported."""


def codebook_statistics(codebook: Codebook) -> dict[str, Any]:
    """`schema.CodeStatistics` of the patches that trained the codebook, and `distances` between its centroids.

    It is not known how often the codes of an imported codebook were used: its `counts`, `usage`, `coverage` and
    `dead_codes` are None.
    """
    statistics: dict[str, Any] = {**code_statistics(codebook.counts)}
    if "imported" in codebook.description:
        statistics |= {"counts": None, "usage": None, "coverage": None, "dead_codes": None}
    return {**statistics, "distances": _distances(codebook)}


def _distances(codebook: Codebook) -> Distances | None:
    if codebook.k < 2:
        return None
    other, apart = nearest_others(codebook)
    order = np.argsort(apart, kind="stable")
    pairs = {tuple(sorted((int(code), int(other[code])))): float(apart[code]) for code in order[: 4 * _CLOSEST]}
    training = codebook.description.get("training") or {}
    error = training.get("mean_squared_distance")
    return {
        "nearest": spread(apart),
        "closest": [[first, second, distance] for (first, second), distance in list(pairs.items())[:_CLOSEST]],
        "twins": int((apart == 0).sum()),
        "of_a_patch": None if error is None else float(error**0.5),
    }


def nearest_others(codebook: Codebook) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each centroid the nearest other one (K,), and the distance to it (K,); K must be 2 or more."""
    other = np.empty(codebook.k, dtype=np.int64)
    with progress("comparing centroids", codebook.k, "centroids") as advance:
        for start in range(0, codebook.k, _BLOCK):
            block = np.arange(start, min(start + _BLOCK, codebook.k))
            codes, _ = codebook.nearest(codebook.centroids[block], 2)
            # Of two equal centroids, either may come first.
            other[block] = np.where(codes[:, 0] == block, codes[:, 1], codes[:, 0])
            advance(len(block))
    return other, distances(codebook.centroids, codebook.centroids[other])


def distances(points: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Euclidean distance (n,) of each point (n, dim) to the other point of the same row, from their differences.

    FAISS's squared distances are less accurate for points that are close together.
    """
    apart = np.empty(len(points))
    for start in range(0, len(points), _BLOCK):
        block = slice(start, start + _BLOCK)
        apart[block] = np.linalg.norm(points[block].astype(np.float64) - others[block], axis=1)
    return apart


def spread(values: NDArray[np.float64]) -> dict[str, float]:
    """Quantiles and mean, as JSON."""
    quantiles = {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
    return {**quantiles, "mean": float(values.mean())}


def objective_of(description: Mapping[str, Any]) -> list[list[float]]:
    """The k-means objective of each restart, one value per iteration; empty if the codebook was imported."""
    return description.get("objective") or []
