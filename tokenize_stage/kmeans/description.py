"""Describes a trained codebook: how it was made, and statistics of k-means and of the sample."""

from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from ...shared.runtime.faiss_build import faiss_gpus, import_faiss
from ...shared.sources.keys import Skipped
from ...shared.tokens.code_usage import usage
from ...shared.tokens.codebook import Codebook
from .plan import CodebookPlan
from .state import KMeansRun
from .train import HIERARCHICAL, KMeansSettings, block_rows, float_blocks, six_digits


def describe_codebook(
    plan: CodebookPlan,
    kmeans: KMeansSettings,
    run: KMeansRun,
    train: NDArray[np.float16],
    held_out: NDArray[np.float16],
    skipped: Skipped,
    unreadable: int,
) -> Codebook:
    """Makes the codebook of a finished k-means run.

    Args:
        plan: the sample and the request.
        kmeans: the settings of k-means.
        run: its result.
        train: (n, dim) the features that it was trained on.
        held_out: (m, dim) features for the statistics of unseen patches.
        skipped: (key, reason) of everything that was left out.
        unreadable: how many of the planned images turned out to be unreadable.
    """
    centroids = run.best_centroids()
    draft = Codebook(centroids, np.zeros(kmeans.k, dtype=np.int64), {})
    counts, distance = _assign(draft, train)
    held_out_counts, held_out_distance = _assign(draft, held_out)
    description = {
        **plan.tower,
        **kmeans.to_json(),
        **({"cells": kmeans.cells} if kmeans.algorithm == HIERARCHICAL else {}),
        "faiss_device": "gpu" if faiss_gpus() else "cpu",
        **run.statistics(),
        "sample": {
            "images": plan.images - unreadable,
            "patches": len(train),
            "held_out": len(held_out),
            "keys_sha256": plan.request["keys_sha256"],
            "drawn": "uniform over all patches, without replacement: the smallest draws by (seed, key)",
            "stored_as": "float16",
            "skipped": [list(pair) for pair in skipped],
        },
        "training": {**usage(counts), "imbalance": _imbalance(counts), "mean_squared_distance": distance},
        "held_out": {**usage(held_out_counts), "mean_squared_distance": held_out_distance},
        "request": plan.request,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "timm", "numpy", "pillow")}
        | {"faiss": import_faiss().__version__},
    }
    return Codebook(centroids, counts, description)


def _assign(codebook: Codebook, rows: NDArray[np.float16]) -> tuple[NDArray[np.int64], float | None]:
    """How many of `rows` are nearest each centroid (K,), and their mean squared distance; block by block."""
    counts, total = np.zeros(codebook.k, dtype=np.int64), 0.0
    for block in float_blocks(rows, block_rows(rows.shape[1])):
        tokens, distances = codebook.assign(block)
        counts += np.bincount(tokens, minlength=codebook.k)
        total += distances.sum(dtype=np.float64)
    return counts, six_digits(total / len(rows)) if len(rows) else None


def _imbalance(counts: NDArray[np.int64]) -> float:
    """FAISS's imbalance factor: 1 if all codes are used equally often, K if a single one is used."""
    return float(len(counts) * (counts.astype(np.float64) ** 2).sum() / counts.sum() ** 2)
