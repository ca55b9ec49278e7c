"""Hierarchical k-means for a K that is too large for Lloyd's: FAISS k-means into cells, and then within each cell.

An iteration costs n x sqrt(K) distances on each of the two levels, and n x K with Lloyd's algorithm. The scheme is that
of `faiss.contrib.clustering.two_level_clustering`, resumable and out of core.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import Tokens
from ...shared.runtime.console import progress
from ...shared.tokens.codebook import Codebook
from .state import KMeansRun, SavedState
from .train import (
    LLOYD,
    SAVE_SECONDS,
    KMeansSettings,
    Steps,
    block_rows,
    bytes_besides_cells,
    flat_index,
    float_blocks,
    refuse_few_distinct,
    refuse_little_memory,
    run_restarts,
    six_digits,
    train_kmeans,
)


def train_hierarchical(
    rows: NDArray[np.float16],
    settings: KMeansSettings,
    *,
    memory: int,
    state: Path | None = None,
    rows_identity: str = "",
    save_seconds: float = SAVE_SECONDS,
) -> KMeansRun:
    """Trains `KMeansSettings.cells` centroids, and in each of their cells its share of the K centroids.

    Codes are shared out by the number of rows in a cell (`share_out`). Both levels have the iterations, the restarts,
    the metric and the first centroids of the settings. The result has one restart: its statistics are sums over all
    cells, of the best restart of each. A row counts with the nearest centroid of its own cell, so that the objective is
    not better than that of the centroids over all rows.

    Arguments and errors are those of `train.train_kmeans`; a second file lies beside `state`.
    """
    count, dim = rows.shape
    refuse_few_distinct(rows, settings.k)
    refuse_little_memory(count, dim, settings, memory)
    coarse = train_kmeans(
        rows,
        replace(settings, k=settings.cells, algorithm=LLOYD),
        memory=memory,
        state=state,
        rows_identity=rows_identity,
        save_seconds=save_seconds,
    )
    cells, distinct = _cells_of(rows, coarse.best_centroids())
    sizes = np.bincount(cells, minlength=settings.cells)
    codes = share_out(sizes, distinct, settings.k)
    # To the file, the cells are the restarts of one run (`_train_cells`).
    identity = {**settings.to_json(), "restarts": settings.cells, "restarts_of_a_cell": settings.restarts}
    identity |= {"shape": [count, dim], "about": rows_identity}
    saved = SavedState(state and state.with_name(f"cells-{state.name}"), identity, save_seconds)
    run = _train_cells(rows, cells, codes, settings, memory - bytes_besides_cells(count, dim, settings.k), saved)
    return _summed(run, sizes[codes > 0], codes[codes > 0])


def _cells_of(rows: NDArray[np.float16], centroids: NDArray[np.float32]) -> tuple[Tokens, NDArray[np.int64]]:
    """The nearest of the centroids (C, dim) of each row (n,), and the number of distinct rows nearest each (C,)."""
    book = Codebook(centroids, np.zeros(len(centroids), dtype=np.int64), {})
    cells = np.empty(len(rows), dtype=np.uint32)
    hashes = np.empty(len(rows), dtype=np.uint64)
    block = block_rows(rows.shape[1])
    with progress("dividing the sample into cells", len(rows), "patches") as advance:
        for number, floats in enumerate(float_blocks(rows, block)):
            here = slice(number * block, number * block + len(floats))
            cells[here] = book.assign(floats)[0]
            hashes[here] = _hashes(rows[here])
            advance(len(floats))
    _, first = np.unique(hashes, return_index=True)
    return cells, np.bincount(cells[first], minlength=len(centroids))


def _hashes(rows: NDArray[np.float16]) -> NDArray[np.uint64]:
    """A hash of each row (n,); adding zero turns -0 into 0."""
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows + np.float16(0))
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def share_out(sizes: NDArray[np.int64], most: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Shares `k` codes out to cells: one to each that has rows, the others by size, by largest remainders.

    Args:
        sizes: (C,) rows of each cell.
        most: (C,) the most codes that each cell can have, its distinct rows; together at least `k`.
        k: the number of codes, at least that of the cells that have rows.

    Returns:
        (C,) codes of each cell; their sum is `k`.
    """
    codes = np.minimum(most, 1)
    left, room = k - int(codes.sum()), most - codes
    weight = np.where(room > 0, sizes, 0)
    while (full := (weight > 0) & (left * weight >= room * weight.sum())).any():
        codes[full] += room[full]
        left -= int(room[full].sum())
        weight[full] = 0
    share, remainder = np.divmod(left * weight, max(int(weight.sum()), 1))
    codes += share
    codes[np.argsort(-remainder, kind="stable")[: left - int(share.sum())]] += 1
    return codes


def _train_cells(
    rows: NDArray[np.float16],
    cells: Tokens,
    codes: NDArray[np.int64],
    settings: KMeansSettings,
    memory: int,
    saved: SavedState,
) -> KMeansRun:
    """k-means within each cell: a run whose "restarts" are the cells that have codes, one after the other."""
    order = np.argsort(cells, kind="stable")
    ends = np.searchsorted(cells[order], np.arange(len(codes)), side="right")
    numbers = np.flatnonzero(codes)
    firsts = np.concatenate([[0], np.cumsum(codes[numbers])])
    run = saved.load()
    if run.centroids is None:
        run = KMeansRun(centroids=np.zeros((settings.k, rows.shape[1]), dtype=np.float32), best=0, best_objective=0.0)
    index = flat_index(rows.shape[1], settings.metric)
    with progress("k-means within cells", len(numbers), "cells", len(run.history)) as advance:
        for at in range(len(run.history), len(numbers)):
            cell = numbers[at]
            own = np.ascontiguousarray(rows[order[ends[cell - 1] if cell else 0 : ends[cell]]])
            of_cell = replace(settings, seed=settings.seed + 1 + int(cell))
            steps = Steps(own, int(codes[cell]), of_cell, memory - own.nbytes, index)
            trained = KMeansRun()
            for _ in run_restarts(trained, steps, of_cell):
                pass
            run.best_centroids()[firsts[at] : firsts[at + 1]] = trained.best_centroids()
            run.history.append(trained.history[trained.best or 0])
            saved.keep(run)
            advance(1)
    return run


def _summed(run: KMeansRun, sizes: NDArray[np.int64], codes: NDArray[np.int64]) -> KMeansRun:
    """The run as one restart over all rows, from a run over cells of `sizes` rows and `codes` codes."""
    count, k = int(sizes.sum()), int(codes.sum())
    summed = []
    for iteration in range(max(map(len, run.history))):
        # After convergence another iteration would only repeat the last one.
        steps = [past[min(iteration, len(past) - 1)] for past in run.history]
        # The imbalance factor is K x sum of squared counts / n^2.
        squares = [step["imbalance"] * size**2 / k_of for step, size, k_of in zip(steps, sizes, codes, strict=True)]
        summed.append(
            {
                "objective": six_digits(_total(steps, "objective")),
                "imbalance": six_digits(k * float(sum(squares)) / count**2),
                "empty_clusters_split": int(_total(steps, "empty_clusters_split")),
            }
        )
    return KMeansRun([summed], run.centroids, 0, summed[-1]["objective"])


def _total(steps: Sequence[dict[str, float]], name: str) -> float:
    return sum(step[name] for step in steps)
