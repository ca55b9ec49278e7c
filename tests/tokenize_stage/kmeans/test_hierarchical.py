"""Hierarchical k-means: FAISS's k-means in cells, resumable to the same bytes, with every code in use."""

import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import DataError, UsageError
from mapet.tokenize_stage.kmeans.duration import comparisons, say_if_long
from mapet.tokenize_stage.kmeans.hierarchical import share_out, train_hierarchical
from mapet.tokenize_stage.kmeans.train import (
    KMeansSettings,
    fixed_bytes,
    least_bytes,
    refuse_little_memory,
    train_kmeans,
)

SETTINGS = KMeansSettings(k=150, iterations=5, restarts=2, seed=3, algorithm="hierarchical")
PLENTY = 1 << 30


def sample(count: int = 6000, dim: int = 16, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centers = random.standard_normal((80, dim))
    return (centers[random.integers(0, 80, count)] + 0.5 * random.standard_normal((count, dim))).astype(np.float16)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)).astype(np.float16)


def faiss_kmeans(rows: np.ndarray, k: int, of: KMeansSettings, seed: int) -> faiss.Kmeans:
    more = {"niter": of.iterations, "nredo": of.restarts, "seed": seed, "spherical": of.metric == "cosine"}
    kmeans = faiss.Kmeans(rows.shape[1], k, max_points_per_centroid=10**9, min_points_per_centroid=1, **more)
    kmeans.train(rows.astype(np.float32))
    return kmeans


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_each_cell_holds_what_bare_faiss_gives_for_its_rows(metric: str):
    of = replace(SETTINGS, metric=metric)
    rows = sample() if metric == "l2" else unit(sample())
    run = train_hierarchical(rows, of, memory=PLENTY)
    coarse = faiss_kmeans(rows, 12, of, of.seed)  # 12 x 12 < 150 < 13 x 13
    cells = coarse.index.search(rows.astype(np.float32), 1)[1][:, 0]
    codes = share_out(np.bincount(cells), np.bincount(cells), of.k)
    fine = [
        faiss_kmeans(rows[cells == cell], int(codes[cell]), of, of.seed + 1 + cell) for cell in range(12) if codes[cell]
    ]
    assert np.array_equal(run.centroids, np.concatenate([one.centroids for one in fine]))
    assert run.history[0][-1]["objective"] == pytest.approx(sum(one.obj[-1] for one in fine), rel=1e-4)
    assert run.best_objective == run.history[0][-1]["objective"]
    assert (len(run.history), run.best) == (1, 0)


def test_the_imbalance_of_all_codes_is_put_together_from_that_of_the_cells():
    rows = sample()
    run = train_hierarchical(rows, replace(SETTINGS, iterations=60, restarts=1), memory=PLENTY)  # until it converges
    counts = np.bincount(faiss.knn(rows.astype(np.float32), run.centroids, 1)[1][:, 0], minlength=SETTINGS.k)
    assert run.history[0][-1]["imbalance"] == pytest.approx(len(counts) * (counts**2).sum() / len(rows) ** 2, rel=0.05)


def test_the_objective_is_near_that_of_lloyd():
    rows = sample(20_000)
    lloyd = train_kmeans(rows, replace(SETTINGS, algorithm="lloyd"), memory=PLENTY)
    ours = train_hierarchical(rows, SETTINGS, memory=PLENTY)
    # Clusters of a mixture that a cell's boundary cuts need codes on both sides.
    assert 0.95 < ours.best_objective / lloyd.best_objective < 1.2
    exact = float(faiss.knn(rows.astype(np.float32), ours.centroids, 1)[0].sum(dtype=np.float64))
    assert exact <= ours.best_objective * (1 + 1e-5)


def test_out_of_core_gives_what_memory_gives(tmp_path: Path):
    rows = sample(70_000)
    rows.tofile(tmp_path / "rows")
    on_disk = np.memmap(tmp_path / "rows", dtype=np.float16, mode="r", shape=rows.shape)
    least = 2 * 4 * 150 * 16 + 24 * len(rows) + least_bytes(*rows.shape, 12)
    assert least < fixed_bytes(*rows.shape, 12) + rows.size * 4
    inside = train_hierarchical(rows, SETTINGS, memory=PLENTY)
    outside = train_hierarchical(on_disk, SETTINGS, memory=least)
    assert np.array_equal(inside.centroids, outside.centroids)
    assert inside.statistics() == outside.statistics()


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 10, 11, 12, 25, 60, 100])
def test_stopped_anywhere_it_goes_on_to_the_same_result(tmp_path: Path, monkeypatch, after: int):
    """In the first level, between the levels, and in the middle of a cell."""
    rows = sample(2000)
    whole = train_hierarchical(rows, SETTINGS, memory=PLENTY)
    state, steps, normal = tmp_path / "state", 0, faiss.Clustering.train

    def train(self, *arguments):
        nonlocal steps
        steps += 1
        if steps == after:
            raise Stop
        return normal(self, *arguments)

    monkeypatch.setattr(faiss.Clustering, "train", train)
    with pytest.raises(Stop):
        train_hierarchical(rows, SETTINGS, memory=PLENTY, state=state, save_seconds=0)
    steps = -1000
    again = train_hierarchical(rows, SETTINGS, memory=PLENTY, state=state, save_seconds=0)
    assert np.array_equal(again.centroids, whole.centroids)
    assert again.statistics() == whole.statistics()
    steps = -1000
    train_hierarchical(rows, SETTINGS, memory=PLENTY, state=state, save_seconds=0)
    assert steps == -1000  # nothing is done twice


CHILD = """
import sys
from pathlib import Path
import numpy as np
from mapet.tokenize_stage.kmeans.hierarchical import train_hierarchical
from mapet.tokenize_stage.kmeans.train import KMeansSettings

rows = np.memmap(sys.argv[1], dtype=np.float16, mode="r").reshape(-1, 16)
settings = KMeansSettings(k=900, iterations=30, restarts=2, algorithm="hierarchical")
train_hierarchical(rows, settings, memory=1 << 30, state=Path(sys.argv[2]), save_seconds=0)
"""


def test_a_kill_within_the_cells_leaves_a_state_to_go_on_from(tmp_path: Path):
    of = KMeansSettings(k=900, iterations=30, restarts=2, algorithm="hierarchical")
    rows, state = sample(20_000), tmp_path / "state"
    rows.tofile(tmp_path / "rows")
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "rows", state])
    until = time.monotonic() + 60
    while not (tmp_path / "cells-state").exists() and time.monotonic() < until and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    again = train_hierarchical(rows, of, memory=PLENTY, state=state)
    whole = train_hierarchical(rows, of, memory=PLENTY)
    assert np.array_equal(again.centroids, whole.centroids)
    assert again.statistics() == whole.statistics()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(("distinct", "k"), [(150, 150), (151, 150), (2, 2), (3, 3), (5, 4)])
def test_hardly_more_distinct_rows_than_codes(distinct: int, k: int, metric: str):
    """Each distinct row is a code of its own, or nearly; none is given away to a cell that has no rows for it."""
    rows = np.repeat(unit(sample(distinct)), 3, axis=0)
    run = train_hierarchical(rows, replace(SETTINGS, k=k, metric=metric), memory=PLENTY)
    assert np.isfinite(run.centroids).all()
    found = np.unique(faiss.knn(rows.astype(np.float32), run.centroids, 1)[1])
    assert len(found) >= k - 1 - k // 10
    if metric == "cosine":
        similarities = faiss.knn(rows.astype(np.float32), run.centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)[0]
        assert run.best_objective == pytest.approx(similarities.sum(), rel=1e-3)
    with pytest.raises(DataError, match=f"--k {distinct + 1} is more than the {distinct} distinct"):
        train_hierarchical(rows, replace(SETTINGS, k=distinct + 1), memory=PLENTY)


CELL = st.integers(0, 1000).flatmap(lambda n: st.tuples(st.just(n), st.integers(min(n, 1), n)))
"""(rows, distinct rows)"""


@settings(max_examples=100, deadline=None)
@given(cells=st.lists(CELL, min_size=1, max_size=12), share=st.floats(0, 1))
def test_codes_are_shared_out_by_size(cells: list[tuple[int, int]], share: float):
    sizes, most = np.array(cells).T
    filled = int((sizes > 0).sum())
    k = filled + int(share * (most.sum() - filled))
    if not k:
        return
    codes = share_out(sizes, most, k)
    assert codes.sum() == k
    assert ((codes >= np.minimum(most, 1)) & (codes <= most)).all()
    if (codes < most)[sizes > 0].all():  # no cell is full
        assert abs(codes - (sizes > 0) - sizes * (k - filled) / sizes.sum()).max() < 1


def test_memory_that_does_not_suffice_for_lloyd_names_the_other_algorithm():
    of = KMeansSettings(k=100_000)
    between = 24 * 100_000 * 64 + 16 * 10**6
    with pytest.raises(DataError, match="use fewer --patches, --algorithm hierarchical"):
        refuse_little_memory(10**6, 64, of, between)
    refuse_little_memory(10**6, 64, replace(of, algorithm="hierarchical"), between)
    with pytest.raises(DataError, match="K=100000 needs"):
        refuse_little_memory(10**6, 64, replace(of, algorithm="hierarchical"), 60_000_000)


def test_a_k_means_of_days_is_announced_with_what_is_faster(monkeypatch, capsys):
    monkeypatch.setattr("mapet.tokenize_stage.kmeans.duration.comparisons_per_second", lambda *_: 1e8)
    of = KMeansSettings(k=1 << 17)
    assert comparisons(10**7, of) == 10**7 * (100 + 1) * (1 << 17)
    say_if_long(10**7, 64, of)
    said = " ".join(capsys.readouterr().err.split())
    days = 10**7 * 101 * (1 << 17) / 1e8 / 86_400
    hours = 10**7 * (20 * 2 * math.isqrt(1 << 17) + (1 << 17)) / 1e8 / 3600
    assert f"K=131072 will take about {days:.1f} days here" in said
    assert f"--algorithm hierarchical --restarts 1 about {hours:.1f} hours" in said
    say_if_long(10**5, 64, KMeansSettings(k=1024))
    say_if_long(10**7, 64, replace(of, restarts=1, algorithm="hierarchical"))
    assert not capsys.readouterr().err


def test_an_unknown_algorithm_is_a_usage_error():
    with pytest.raises(UsageError, match="--algorithm fast is unknown; choose lloyd or hierarchical"):
        KMeansSettings(algorithm="fast")
