"""Compares hierarchical k-means with Lloyd's on one sample: error and time. Prints one JSON line per metric.

python benchmarks/kmeans_algorithms.py                          # a mixture of 4,096 clusters
python benchmarks/kmeans_algorithms.py --features features.npy  # features of a tower
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import typer
from mapet.tokenize_stage.kmeans.hierarchical import train_hierarchical
from mapet.tokenize_stage.kmeans.state import KMeansRun
from mapet.tokenize_stage.kmeans.train import KMeansSettings, block_rows, float_blocks, train_kmeans

_CLUSTERS, _HELD_OUT = 4096, 20_000


def mixture(count: int, dim: int) -> np.ndarray:
    """Overlapping clusters (count, dim) in fp16, in random order."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((_CLUSTERS, dim), dtype=np.float32)
    rows = centers[random.integers(0, _CLUSTERS, count)]
    return (rows + 0.7 * random.standard_normal((count, dim), dtype=np.float32)).astype(np.float16)


def of_file(file: Path, count: int) -> np.ndarray:
    """The first rows of a .npy file of features."""
    rows = np.load(file, mmap_mode="r")
    return np.asarray(rows[:count], dtype=np.float16)


def main(
    count: int = 200_000,
    dim: int = 64,
    k: int = 1024,
    iterations: int = 20,
    restarts: int = 1,
    metric: str = "l2",
    features: Annotated[Path | None, typer.Option(help=".npy of features (n, dim) instead of the mixture.")] = None,
    threads: int = 2,
) -> None:
    """Trains both on the same rows. On a busy machine only `cpu_seconds` means something.

    Error is the mean squared distance to the nearest of all centroids.
    """
    faiss.omp_set_num_threads(threads)
    rows = mixture(count + _HELD_OUT, dim) if features is None else of_file(features, count + _HELD_OUT)
    rows, held_out = rows[:-_HELD_OUT], rows[-_HELD_OUT:]
    lloyd = KMeansSettings(k=k, iterations=iterations, restarts=restarts, metric=metric)
    results = {
        "lloyd": measured(train_kmeans, rows, held_out, lloyd),
        "hierarchical": measured(train_hierarchical, rows, held_out, replace(lloyd, algorithm="hierarchical")),
    }
    options = {"rows": len(rows), "dim": rows.shape[1], "k": k, "iterations": iterations, "restarts": restarts}
    options |= {"metric": metric, "threads": threads, "features": features.name if features else "mixture"}
    for name in ("error", "held_out_error", "seconds", "cpu_seconds", "dead"):
        ours, theirs = (results[algorithm][name] for algorithm in ("hierarchical", "lloyd"))
        figure = {"figure": f"{name}: hierarchical / Lloyd", "ratio": round(ours / theirs, 4) if theirs else None}
        print(json.dumps({**figure, "hierarchical": ours, "lloyd": theirs, **options}), flush=True)


def measured(
    train: Callable[..., KMeansRun], rows: np.ndarray, held_out: np.ndarray, settings: KMeansSettings
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        began, worked = time.perf_counter(), time.process_time()
        run = train(rows, settings, memory=1 << 40, state=Path(folder, "state"))
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    error, used = nearest(rows, run.best_centroids())
    held_out_error, _ = nearest(held_out, run.best_centroids())
    return {
        "error": error,
        "held_out_error": held_out_error,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "dead": settings.k - used,
    }


def nearest(rows: np.ndarray, centroids: np.ndarray) -> tuple[float, int]:
    """Mean squared distance of the rows to their nearest centroids, and how many of these are in use."""
    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(centroids)
    parts = [index.search(block, 1) for block in float_blocks(rows, block_rows(rows.shape[1]))]
    total = sum(distances.sum(dtype=np.float64) for distances, _ in parts)
    return round(float(total) / len(rows), 5), len(np.unique(np.concatenate([codes for _, codes in parts])))


if __name__ == "__main__":
    typer.run(main)
