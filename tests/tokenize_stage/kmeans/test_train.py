"""k-means is FAISS's own, in memory and out of core, and goes on after a kill to the same bytes."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from mapet.shared.errors import DataError, UsageError
from mapet.tokenize_stage.kmeans.train import (
    KMeansSettings,
    fixed_bytes,
    least_bytes,
    refuse_few_distinct,
    train_kmeans,
)

SETTINGS = KMeansSettings(k=40, iterations=6, restarts=3, seed=5)
PLENTY = 1 << 30


def sample(count: int = 9000, dim: int = 24, seed: int = 0) -> np.ndarray:
    """Overlapping clusters, so that restarts end differently and rows change sides until late."""
    random = np.random.default_rng(seed)
    centers = random.standard_normal((60, dim))
    return (centers[random.integers(0, 60, count)] + 0.7 * random.standard_normal((count, dim))).astype(np.float16)


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)).astype(np.float16)


def bare(rows: np.ndarray, settings: KMeansSettings, **more) -> faiss.Kmeans:
    kmeans = faiss.Kmeans(
        rows.shape[1],
        settings.k,
        niter=settings.iterations,
        nredo=settings.restarts,
        seed=settings.seed,
        spherical=settings.metric == "cosine",
        max_points_per_centroid=len(rows),
        **more,
    )
    kmeans.train(rows.astype(np.float32))
    return kmeans


def too_little(rows: np.ndarray, k: int) -> int:
    """The least memory that k-means accepts, which does not hold these rows in float32."""
    least = least_bytes(*rows.shape, k)
    assert least < fixed_bytes(*rows.shape, k) + rows.size * 4
    return least


def on_disk(rows: np.ndarray, path: Path) -> np.ndarray:
    rows.tofile(path)
    return np.memmap(path, dtype=np.float16, mode="r", shape=rows.shape)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("seed", [0, 5])
def test_it_is_bare_faiss_on_the_same_rows(metric: str, seed: int):
    settings = replace(SETTINGS, metric=metric, seed=seed)
    rows = sample() if metric == "l2" else unit(sample())
    run, theirs = train_kmeans(rows, settings, memory=PLENTY), bare(rows, settings)
    assert np.array_equal(run.centroids, theirs.centroids)
    ours = run.history[run.best]
    assert [step["objective"] for step in ours] == pytest.approx(theirs.obj[-len(ours) :], rel=1e-5)
    last = theirs.iteration_stats[-1]
    assert (ours[-1]["imbalance"], ours[-1]["empty_clusters_split"]) == (
        pytest.approx(last["imbalance_factor"], rel=1e-5),
        last["nsplit"],
    )
    assert len(run.history) == 3
    sign = 1 if metric == "l2" else -1
    assert run.best == min(range(3), key=lambda restart: sign * run.history[restart][-1]["objective"])


@pytest.mark.skipif(not hasattr(faiss, "ClusteringInitialization"), reason="an older FAISS")
def test_kmeans_plus_plus_is_that_of_faiss():
    settings = replace(SETTINGS, k=200, init="k-means++")
    rows = sample()
    run = train_kmeans(rows, settings, memory=PLENTY)
    theirs = bare(rows, settings, init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS)
    assert np.array_equal(run.centroids, theirs.centroids)
    assert not np.array_equal(
        run.centroids, train_kmeans(rows, replace(settings, init="random"), memory=PLENTY).centroids
    )


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_out_of_core_gives_what_memory_gives(tmp_path: Path, metric: str):
    settings = replace(SETTINGS, metric=metric, iterations=4, restarts=2)
    rows = sample(70_000) if metric == "l2" else unit(sample(70_000))
    inside = train_kmeans(rows, settings, memory=PLENTY)
    outside = train_kmeans(on_disk(rows, tmp_path / "rows"), settings, memory=too_little(rows, settings.k))
    assert np.array_equal(inside.centroids, outside.centroids)
    assert inside.statistics() == outside.statistics()


def test_less_memory_than_out_of_core_needs_is_refused_with_the_arithmetic():
    rows = sample()
    with pytest.raises(DataError, match=r"--memory 1e\+03 kB is too little: k-means of 9000 patches x 24 features"):
        train_kmeans(rows, SETTINGS, memory=999_999)


@pytest.mark.skipif(not hasattr(faiss, "ClusteringInitialization"), reason="an older FAISS")
def test_what_kmeans_plus_plus_looks_at_counts_as_memory():
    rows, settings = sample(60_000), replace(SETTINGS, k=700, iterations=1, restarts=1, init="k-means++")
    least = least_bytes(*rows.shape, 700, "k-means++")
    assert least > least_bytes(*rows.shape, 700)
    train_kmeans(rows, settings, memory=least)
    with pytest.raises(DataError, match="or --init random"):
        train_kmeans(rows, settings, memory=least - 1)


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", range(1, 9))
def test_stopped_anywhere_it_goes_on_to_the_same_result(tmp_path: Path, monkeypatch, after: int):
    """Ends in the middle of a step, after any number of steps, with what was saved up to then."""
    settings = replace(SETTINGS, iterations=3)
    rows = sample(3000)
    whole = train_kmeans(rows, settings, memory=PLENTY)
    state, steps = tmp_path / "state", 0
    normal = faiss.Clustering.train

    def train(self, *arguments):
        nonlocal steps
        steps += 1
        if steps == after:
            raise Stop
        return normal(self, *arguments)

    monkeypatch.setattr(faiss.Clustering, "train", train)
    with pytest.raises(Stop):
        train_kmeans(rows, settings, memory=PLENTY, state=state, save_seconds=0)
    steps = -1000
    again = train_kmeans(rows, settings, memory=PLENTY, state=state, save_seconds=0)
    assert steps + 1000 == 9 - (after - 1)
    assert np.array_equal(again.centroids, whole.centroids)
    assert again.statistics() == whole.statistics()


CHILD = """
import sys
from pathlib import Path
import numpy as np
from mapet.tokenize_stage.kmeans.train import KMeansSettings, train_kmeans

rows = np.memmap(sys.argv[1], dtype=np.float16, mode="r").reshape(-1, 24)
settings = KMeansSettings(k=300, iterations=200, restarts=2)
train_kmeans(rows, settings, memory=1 << 30, state=Path(sys.argv[2]), save_seconds=0)
"""


def test_a_kill_leaves_a_state_to_go_on_from(tmp_path: Path):
    settings = KMeansSettings(k=300, iterations=200, restarts=2)
    rows, state = on_disk(sample(20_000), tmp_path / "rows"), tmp_path / "state"
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "rows", state])
    until = time.monotonic() + 60
    while not state.exists() and time.monotonic() < until and child.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    again = train_kmeans(rows, settings, memory=PLENTY, state=state)
    whole = train_kmeans(rows, settings, memory=PLENTY)
    assert np.array_equal(again.centroids, whole.centroids)
    assert again.statistics() == whole.statistics()


def test_a_state_of_other_rows_or_settings_or_a_damaged_one_starts_over(tmp_path: Path, capsys):
    settings = replace(SETTINGS, iterations=2, restarts=1)
    rows, state = sample(3000), tmp_path / "state"
    train_kmeans(rows, settings, memory=PLENTY, state=state, rows_identity="first", save_seconds=0)
    capsys.readouterr()
    for other, about in ((settings, "second"), (replace(settings, seed=1), "second")):
        run = train_kmeans(rows, other, memory=PLENTY, state=state, rows_identity=about, save_seconds=0)
        assert "starting over" in capsys.readouterr().err
        assert np.array_equal(run.centroids, train_kmeans(rows, other, memory=PLENTY).centroids)
    state.write_bytes(state.read_bytes()[:50])
    train_kmeans(rows, settings, memory=PLENTY, state=state)
    assert "starting over" in capsys.readouterr().err


def test_a_large_sample_is_not_subsampled():
    """512 rows a centroid: FAISS alone would take 256 of them."""
    rows = sample(1024, dim=4)
    run = train_kmeans(rows, KMeansSettings(k=2, iterations=1, restarts=1), memory=PLENTY)
    start = bare(rows, KMeansSettings(k=2, iterations=1, restarts=1))
    assert run.history[0][0]["objective"] == pytest.approx(start.obj[0], rel=1e-5)


def test_empty_clusters_are_counted():
    """All rows but two are the same, so that most initial centroids get nothing."""
    rows = np.zeros((500, 4), dtype=np.float16)
    rows[:8, 0] = np.arange(8)
    run = train_kmeans(rows, KMeansSettings(k=6, iterations=2, restarts=1), memory=PLENTY)
    assert run.history[0][0]["empty_clusters_split"] > 0
    assert run.history[0][0]["imbalance"] > 2


@pytest.mark.parametrize(("distinct", "k", "fine"), [(7, 7, True), (7, 8, False), (1, 2, False)])
def test_fewer_distinct_rows_than_codes_are_a_data_error_with_both_numbers(distinct: int, k: int, fine: bool):
    rows = np.repeat(sample(distinct), 1500, axis=0)
    if fine:
        refuse_few_distinct(rows, k)
    else:
        message = rf"--k {k} is more than the {distinct} distinct features among the {1500 * distinct} patches"
        with pytest.raises(DataError, match=message):
            train_kmeans(rows, KMeansSettings(k=k), memory=PLENTY)


def test_the_two_zeros_are_one_value():
    rows = np.zeros((10, 3), dtype=np.float16)
    rows[::2] = -0.0
    with pytest.raises(DataError, match="the 1 distinct features"):
        refuse_few_distinct(rows, 2)


@pytest.mark.parametrize("seed", [-1, 2**31, 2**40])
def test_any_seed_is_repeatable(seed: int):
    """A negative seed means the clock to FAISS."""
    settings = replace(SETTINGS, seed=seed, iterations=1, restarts=2)
    first, second = (train_kmeans(sample(2000), settings, memory=PLENTY) for _ in range(2))
    assert np.array_equal(first.centroids, second.centroids)


@pytest.mark.parametrize(
    ("bad", "option"),
    [
        ({"k": 1}, "--k 1"),
        ({"k": 2**31 + 1}, "--k 2147483649 must lie between 2 and 2147483648"),
        ({"iterations": 0}, "--iterations"),
        ({"restarts": 0}, "--restarts"),
        ({"metric": "l1"}, "--metric l1"),
        ({"init": "best"}, "--init best is unknown; choose random or k-means++"),
    ],
)
def test_impossible_settings_are_usage_errors_that_name_the_option(bad: dict, option: str):
    with pytest.raises(UsageError, match=option.replace("+", r"\+")):
        KMeansSettings(**bad)
