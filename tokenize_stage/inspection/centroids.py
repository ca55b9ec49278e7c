"""The figures of a codebook: how its codes were used in training, and how far its centroids lie from each other."""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from ...shared.runtime.console import progress
from ...shared.tokens.codebook import Codebook
from .schema import code_figures

_CLOSEST = 10
_BLOCK = 4096
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


class Distances(TypedDict):
    """Euclidean distances from each centroid to the nearest other one; None in a codebook of one centroid."""

    nearest: dict[str, float]
    """min, p10, median, p90, max and mean."""
    closest: list[list[Any]]
    """[code, code, distance] of the ten closest pairs."""
    twins: int
    """Centroids that another one equals."""
    of_a_patch: float | None
    """Root mean square distance of a patch of the sample to its centroid, to compare with; None if imported."""


def codebook_figures(book: Codebook) -> dict[str, Any]:
    """`figures.code_figures` of the patches that k-means saw, and `distances` between centroids.

    Of an imported codebook nobody knows how often its codes were used: `usage` and `counts` are None.
    """
    used = code_figures(book.counts)
    if "imported" in book.description:
        used = {**used, "counts": None, "usage": None, "coverage": None, "dead_codes": None}
    return {**used, "distances": _distances(book)}


def _distances(book: Codebook) -> Distances | None:
    if book.k < 2:
        return None
    other, apart = nearest_others(book)
    order = np.argsort(apart, kind="stable")
    pairs = {tuple(sorted((int(code), int(other[code])))): float(apart[code]) for code in order[: 4 * _CLOSEST]}
    training = book.description.get("training") or {}
    error = training.get("mean_squared_distance")
    return {
        "nearest": spread(apart),
        "closest": [[one, two, distance] for (one, two), distance in list(pairs.items())[:_CLOSEST]],
        "twins": int((apart == 0).sum()),
        "of_a_patch": None if error is None else float(error**0.5),
    }


def nearest_others(book: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """For each centroid the nearest other one, (K,) int64, and the distance to it, (K,) float64; K is 2 or more."""
    other = np.empty(book.k, dtype=np.int64)
    with progress("comparing centroids", book.k, "centroids") as advance:
        for start in range(0, book.k, _BLOCK):
            own = np.arange(start, min(start + _BLOCK, book.k))
            codes, _ = book.nearest(book.centroids[own], 2)
            # Of equal centroids either may be found first.
            other[own] = np.where(codes[:, 0] == own, codes[:, 1], codes[:, 0])
            advance(len(own))
    return other, distances(book.centroids, book.centroids[other])


def distances(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Euclidean distance of each of n points (n, dim) to its fellow, (n,) float64, by differences.

    FAISS's own squared distances lose what is small beside the points' lengths.
    """
    apart = np.empty(len(ones))
    for start in range(0, len(ones), _BLOCK):
        part = slice(start, start + _BLOCK)
        apart[part] = np.linalg.norm(ones[part].astype(np.float64) - others[part], axis=1)
    return apart


def spread(values: np.ndarray) -> dict[str, float]:
    """Quantiles and mean, as JSON."""
    found = {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
    return {**found, "mean": float(values.mean())}


def objective_of(description: Mapping[str, Any]) -> list[list[float]]:
    """The k-means objective (sum of squared distances) of each restart, iteration by iteration; empty if imported."""
    return description.get("objective") or []
