"""k-means over an fp16 sample, in memory or out of core: runs FAISS's clustering one iteration at a time."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import MAX_K
from ...shared.errors import DataError, UsageError
from ...shared.runtime.console import progress
from ...shared.runtime.faiss_build import faiss_gpus, import_faiss
from ...shared.runtime.memory import as_text
from .state import KMeansRun, SavedState

METRICS = ("l2", "cosine")
INITS = ("random", "k-means++")
LLOYD, HIERARCHICAL = ALGORITHMS = ("lloyd", "hierarchical")
# FAISS adds this to the seed for each of its own restarts (`nredo`).
_SEED_STEP = 15486557
# k-means++ costs rows x K x dim without any batching, so that it uses only so many rows per centroid.
SEEDING_ROWS_PER_CENTROID = 64
# FAISS sums the objective in float32, which drifts beyond this many rows (by 9 % at 30 million): too much to compare
# restarts by.
_MOST_ROWS_OF_A_FLOAT_SUM = 1 << 22
SAVE_SECONDS = 10.0


@dataclass(frozen=True)
class KMeansSettings:
    """The settings of k-means; the defaults are those of the paper."""

    k: int = 8192
    iterations: int = 20
    restarts: int = 5
    metric: str = "l2"
    seed: int = 0
    init: str = "random"
    algorithm: str = LLOYD

    def __post_init__(self) -> None:
        if not 2 <= self.k <= MAX_K:
            raise UsageError(f"--k {self.k} must lie between 2 and {MAX_K}.")
        if self.iterations < 1 or self.restarts < 1:
            raise UsageError("--iterations and --restarts must be at least 1.")
        if self.metric not in METRICS:
            raise UsageError(f"--metric {self.metric} is unknown; choose {' or '.join(METRICS)}.")
        if self.init not in INITS:
            raise UsageError(f"--init {self.init} is unknown; choose {' or '.join(INITS)}.")
        if self.algorithm not in ALGORITHMS:
            raise UsageError(f"--algorithm {self.algorithm} is unknown; choose {' or '.join(ALGORITHMS)}.")

    @property
    def cells(self) -> int:
        """How many cells the hierarchical algorithm divides the rows into: the square root of K."""
        return max(2, math.isqrt(self.k))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON; as before there was a choice, `algorithm` is absent for Lloyd's."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("algorithm", LLOYD)}

    def check_faiss(self) -> None:
        """Raises UsageError if the installed FAISS does not support these settings."""
        faiss = import_faiss()
        if self.init == "k-means++" and not hasattr(faiss, "ClusteringInitialization"):
            raise UsageError(f"--init k-means++ needs a newer FAISS than {faiss.__version__}; use --init random.")


def train_kmeans(
    rows: NDArray[np.float16],
    settings: KMeansSettings,
    *,
    memory: int,
    state: Path | None = None,
    rows_identity: str = "",
    save_seconds: float = SAVE_SECONDS,
) -> KMeansRun:
    """Trains centroids; the result is that of `faiss.Kmeans` on the same rows in float32.

    Args:
        rows: (n, dim) float16, of length one if the metric is cosine; it may be a memory-mapped file.
        settings: K, iterations, restarts, metric, seed and first centroids.
        memory: bytes of anonymous memory to use. All rows are held in float32 if they fit, and are otherwise decoded
            block by block.
        state: a file that keeps the progress. A later call with the same rows and settings resumes from it with the
            same result. The caller removes the file.
        rows_identity: names the rows in `state`.
        save_seconds: seconds between two saves.

    Raises:
        DataError: there are fewer distinct rows than K, or too little memory.
    """
    settings.check_faiss()
    refuse_few_distinct(rows, settings.k)
    steps = Steps(rows, settings.k, settings, memory)
    saved = SavedState(state, {**settings.to_json(), "shape": list(rows.shape), "about": rows_identity}, save_seconds)
    run = saved.load()
    done = settings.iterations * max(0, len(run.history) - 1) + (len(run.history[-1]) if run.history else 0)
    with progress(f"k-means {steps.where}", settings.iterations * settings.restarts, "iterations", done) as advance:
        for finished in run_restarts(run, steps, settings):
            last = run.history[-1][-1]
            advance(finished, f"restart {len(run.history)}/{settings.restarts}, objective {last['objective']:.5g}")
            saved.keep(run)
    return run


def run_restarts(run: KMeansRun, steps: "Steps", settings: KMeansSettings) -> Iterator[int]:
    """Runs all restarts from where `run` stopped; yields the number of iterations that each step finished."""
    for restart in range(max(0, len(run.history) - 1), settings.restarts):
        yield from _restart(run, restart, steps, settings)


def _restart(run: KMeansRun, restart: int, steps: "Steps", settings: KMeansSettings) -> Iterator[int]:
    """Runs one restart to its end, from where it stopped; yields the number of iterations that each step finished."""
    if restart == len(run.history):
        run.history.append([])
        run.current = steps.first_centroids(restart)
    past = run.history[restart]
    while run.current is not None:
        before = run.current
        run.current, statistics = steps.iterate(before)
        past.append(statistics)
        converged = np.array_equal(before, run.current)
        # After convergence another iteration would only repeat this one.
        remaining = 0 if converged else settings.iterations - len(past)
        if remaining == 0:
            _keep_if_best(run, restart, steps.objective(run.current, past[-1]["objective"]), settings)
        yield 1 + (settings.iterations - len(past) if converged else 0)


def _keep_if_best(run: KMeansRun, restart: int, objective: float, settings: KMeansSettings) -> None:
    """Ends a restart: its centroids become the run's if its objective is the best one so far."""
    minimised = settings.metric == "l2"
    if run.best_objective is None or (objective < run.best_objective if minimised else objective > run.best_objective):
        run.centroids, run.best, run.best_objective = run.current, restart, objective
    run.current = None


class Steps:
    """The iterations of FAISS's clustering of given rows, in memory or out of core."""

    def __init__(self, rows: NDArray[np.float16], k: int, settings: KMeansSettings, memory: int, index: Any = None):
        """Takes `k` instead of the one of the settings; `index` is a `flat_index` that is used for other rows, too."""
        self.faiss = import_faiss()
        self.rows, self.k, self.settings = rows, k, settings
        count, dim = rows.shape
        self.block = block_rows(dim)
        _refuse_less_than(least_bytes(count, dim, k, settings.init), count, dim, k, settings, memory)
        self.in_memory = fixed_bytes(count, dim, k) + rows.size * 4 <= memory
        self.floats = _as_floats(rows, self.block) if self.in_memory else None
        self.index = flat_index(dim, settings.metric) if index is None else index

    @property
    def where(self) -> str:
        device = f"{faiss_gpus()} GPU(s)" if faiss_gpus() else "the CPU"
        return f"on {device}, {'in memory' if self.in_memory else 'out of core'}"

    def first_centroids(self, restart: int) -> NDArray[np.float32]:
        """(K, dim) rows, chosen as FAISS chooses them for this restart."""
        # For a negative seed FAISS uses the clock, and a larger one does not fit.
        seed = (self.settings.seed + restart * _SEED_STEP) % (1 << 31) + 1
        centroids = self._random_rows(seed) if self.settings.init == "random" else self._kmeans_plus_plus_rows(seed)
        return self._unit(centroids)

    def _random_rows(self, seed: int) -> NDArray[np.float32]:
        order = np.empty(len(self.rows), dtype=np.int32)
        self.faiss.rand_perm(self.faiss.swig_ptr(order), len(order), seed)
        return self.rows[order[: self.k]].astype(np.float32)

    def _kmeans_plus_plus_rows(self, seed: int) -> NDArray[np.float32]:
        k, dim = self.k, self.rows.shape[1]
        # Rows are in random order, so that the first ones are a uniform sample.
        first = self.rows[: SEEDING_ROWS_PER_CENTROID * k]
        floats = np.ascontiguousarray(first, dtype=np.float32) if self.floats is None else self.floats[: len(first)]
        seeding = self.faiss.ClusteringInitialization(dim, k)
        seeding.method = self.faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
        seeding.seed = seed
        centroids = np.empty((k, dim), dtype=np.float32)
        seeding.init_centroids(len(floats), self.faiss.swig_ptr(floats), self.faiss.swig_ptr(centroids))
        return centroids

    def iterate(self, centroids: NDArray[np.float32]) -> tuple[NDArray[np.float32], dict[str, float]]:
        """Runs one iteration from these centroids (K, dim); returns the next ones and FAISS's statistics."""
        faiss, (count, dim) = self.faiss, self.rows.shape
        clustering = faiss.Clustering(dim, self.k)
        clustering.niter = 1
        # Otherwise FAISS silently subsamples to 256 points per centroid, and warns below 39.
        clustering.max_points_per_centroid = math.ceil(count / self.k) + 1
        clustering.min_points_per_centroid = 1
        clustering.decode_block_size = self.block
        if hasattr(clustering, "check_input_data_for_NaNs"):
            clustering.check_input_data_for_NaNs = False  # they were finite when they were written
        faiss.copy_array_to_vector(centroids.ravel(), clustering.centroids)
        if self.floats is not None:
            clustering.train(self.floats, self.index)
        else:
            clustering.train_encoded(self.rows.view(np.uint8), _codec(dim), self.index)
        step = clustering.iteration_stats.at(0)
        # With a centroid for each row FAISS copies the rows and states an objective of 0, also for similarities.
        copied = count == self.k and self.settings.metric == "cosine"
        statistics = {
            # The last digits of a float32 sum depend on whether it was computed in blocks.
            "objective": float(count) if copied else six_digits(step.obj),
            "imbalance": six_digits(step.imbalance_factor),
            "empty_clusters_split": int(step.nsplit),
        }
        updated = faiss.vector_float_to_array(clustering.centroids).reshape(-1, dim)
        return self._unit(updated), statistics

    def objective(self, centroids: NDArray[np.float32], reported: float) -> float:
        """The objective that restarts are compared by: FAISS's sum, or for very many rows an accurate one."""
        if self.settings.restarts == 1 or len(self.rows) <= _MOST_ROWS_OF_A_FLOAT_SUM:
            return reported
        self.index.reset()
        self.index.add(centroids)
        blocks = (self.index.search(block, 1)[0] for block in float_blocks(self.rows, self.block))
        return float(sum(distances.sum(dtype=np.float64) for distances in blocks))

    def _unit(self, centroids: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalises the centroids of spherical k-means; FAISS itself would do so twice per iteration."""
        if self.settings.metric == "cosine":
            self.faiss.normalize_L2(centroids)
        return centroids


def six_digits(value: float) -> float:
    """A statistic as it is recorded: further digits depend on how rows lie in memory."""
    return float(f"{value:.6g}")


def flat_index(dim: int, metric: str) -> Any:
    """FAISS's exact index of centroids, empty, on all GPUs if there are any."""
    faiss = import_faiss()
    index = faiss.IndexFlatL2(dim) if metric == "l2" else faiss.IndexFlatIP(dim)
    return faiss.index_cpu_to_all_gpus(index) if faiss_gpus() else index


def block_rows(dim: int) -> int:
    """Number of rows that are decoded at a time, up to 64 MiB of them; FAISS compares 4,096 at once."""
    return int(np.clip((1 << 24) // dim // 4096, 1, 8)) * 4096


def fixed_bytes(count: int, dim: int, k: int) -> int:
    """Anonymous memory of k-means besides the rows: FAISS's order, assignments, distances and copies of centroids."""
    return 16 * count + 6 * 4 * k * dim


def least_bytes(count: int, dim: int, k: int, init: str = "random") -> int:
    """Anonymous memory that k-means needs out of core: `fixed_bytes`, and the rows that are in float32 at a time."""
    seeding = 0 if init == "random" else min(count, SEEDING_ROWS_PER_CENTROID * k)
    return fixed_bytes(count, dim, k) + max(block_rows(dim), seeding) * dim * 4


def refuse_little_memory(count: int, dim: int, settings: KMeansSettings, memory: int) -> None:
    """Raises DataError if k-means of `count` rows does not even fit in `memory` bytes out of core."""
    needed = least_bytes(count, dim, settings.k, settings.init)
    in_cells = bytes_besides_cells(count, dim, settings.k) + least_bytes(count, dim, settings.cells, settings.init)
    if settings.algorithm == HIERARCHICAL:
        _refuse_less_than(in_cells, count, dim, settings.k, settings, memory)
    else:
        cheaper = f", --algorithm {HIERARCHICAL}" if in_cells <= memory else ""
        _refuse_less_than(needed, count, dim, settings.k, settings, memory, cheaper)


def bytes_besides_cells(count: int, dim: int, k: int) -> int:
    """Anonymous memory of the hierarchical algorithm besides k-means of a cell: the centroids, twice while they are
    saved, and the cell, the order and a hash of each row."""
    return 2 * 4 * k * dim + 24 * count


def _refuse_less_than(
    needed: int, count: int, dim: int, k: int, settings: KMeansSettings, memory: int, cheaper: str = ""
) -> None:
    if needed > memory:
        alternative = cheaper if settings.init == "random" else f"{cheaper}, or --init random"
        raise DataError(
            f"--memory {as_text(memory)} is too little: k-means of {count} patches x {dim} features and K={k} "
            f"needs {as_text(needed)} even out of core; give more, or use fewer --patches{alternative}."
        )


def float_blocks(rows: NDArray[np.float16], block: int) -> Iterator[NDArray[np.float32]]:
    """Yields `rows` in float32, `block` of them at a time."""
    for start in range(0, len(rows), block):
        yield np.asarray(rows[start : start + block], dtype=np.float32)


def _as_floats(rows: NDArray[np.float16], block: int) -> NDArray[np.float32]:
    """All rows in float32, converted by FAISS on all cores; numpy would use one."""
    codec, floats = _codec(rows.shape[1]), np.empty(rows.shape, dtype=np.float32)
    for start in range(0, len(rows), block):
        codec.sa_decode(rows[start : start + block].view(np.uint8), floats[start : start + block])
    return floats


def _codec(dim: int) -> Any:
    faiss = import_faiss()
    return faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)


def refuse_few_distinct(rows: NDArray[np.float16], k: int) -> None:
    """Raises DataError if `rows` (n, dim) has fewer than `k` distinct rows. Stops reading at the k-th."""
    seen = set()
    for start in range(0, len(rows), 4096):
        # Adding zero turns -0 into 0.
        for row in rows[start : start + 4096] + np.float16(0):
            seen.add(hashlib.blake2b(row.tobytes(), digest_size=16).digest())
        if len(seen) >= k:
            return
    raise DataError(
        f"--k {k} is more than the {len(seen)} distinct features among the {len(rows)} patches of the sample; "
        "use a smaller --k or more images."
    )
