"""Compares k-means with bare faiss.Kmeans, and its memory out of core. Prints one JSON line per metric.

python benchmarks/kmeans.py time                  # in memory and out of core / bare faiss.Kmeans, wall time
python benchmarks/kmeans.py memory --folder DIR   # 20 M x 64 under --memory 1GB against in memory (2.6 GB of disk)
"""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import typer
from mapet.shared.runtime.memory import memory_budget
from mapet.throughput.tokenizing import bare_kmeans
from mapet.tokenize_stage.kmeans.train import (
    KMeansSettings,
    block_rows,
    fixed_bytes,
    float_blocks,
    least_bytes,
    train_kmeans,
)

app = typer.Typer(pretty_exceptions_enable=False)
_BLOCK = 1 << 18


def write_rows(path: Path, count: int, dim: int) -> None:
    """Writes overlapping clusters in fp16, in random order."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((4096, dim), dtype=np.float32)
    with open(path, "wb") as file:
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            rows = centers[random.integers(0, len(centers), size)]
            rows += 0.7 * random.standard_normal((size, dim), dtype=np.float32)
            file.write(rows.astype(np.float16).tobytes())


def open_rows(path: Path, dim: int) -> np.ndarray:
    return np.memmap(path, dtype=np.float16, mode="r").reshape(-1, dim)


def seconds(step: Callable[[], object]) -> tuple[float, float]:
    """(wall time, CPU time of all cores) of a step; on a busy machine only the second one is meaningful."""
    began = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - began[0], time.process_time() - began[1]


@app.command("time")
def compare_time(
    count: int = 1 << 17,
    dim: int = 256,
    k: int = 1024,
    iterations: int = 10,
    restarts: int = 1,
    pairs: int = 5,
    threads: int = 2,
) -> None:
    """Time of ours / faiss.Kmeans on the same fp16 array, interleaved; both convert it to float32 first.

    `ratio_to_float32` compares with faiss.Kmeans on rows that are in float32 already.
    """
    faiss.omp_set_num_threads(threads)
    settings = KMeansSettings(k=k, iterations=iterations, restarts=restarts)
    least = least_bytes(count, dim, k)
    if least >= fixed_bytes(count, dim, k) + 4 * count * dim:
        sys.exit("The sample is smaller than one block; give a larger --count.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        write_rows(path, count, dim)
        rows = open_rows(path, dim)
        floats = rows.astype(np.float32)

        def bare(array: np.ndarray) -> faiss.Kmeans:
            return bare_kmeans(array, k, iterations, restarts)

        sides = {
            "in memory": lambda: train_kmeans(rows, settings, memory=1 << 40, state=Path(folder, "state")),
            "out of core": lambda: train_kmeans(rows, settings, memory=least, state=Path(folder, "state")),
        }
        reference = bare(rows)
        for name, step in sides.items():
            run = step()
            times = []
            for _ in range(pairs):
                Path(folder, "state").unlink(missing_ok=True)  # it would resume from it
                times.append((seconds(step), seconds(lambda: bare(rows)), seconds(lambda: bare(floats))))
            figure = {
                "figure": f"k-means {name} / bare faiss.Kmeans",
                "ratio_median": median_ratio(times, 1, 0),
                "cpu_ratio_median": median_ratio(times, 1, 1),
                "ratio_to_float32": median_ratio(times, 2, 0),
                "cpu_ratio_to_float32": median_ratio(times, 2, 1),
                "ours_seconds": round(statistics.median(ours[0] for ours, _, _ in times), 3),
                "faiss_seconds": round(statistics.median(faiss_times[0] for _, faiss_times, _ in times), 3),
                "same_centroids": bool(np.array_equal(run.centroids, reference.centroids)),
                "objective_ratio": round(run.best_objective / float(reference.obj[-1]), 6),
            }
            options = {"count": count, "dim": dim, "k": k, "iterations": iterations, "restarts": restarts}
            say({**figure, "target": "at most 1.05 in memory", **options, "threads": threads, "pairs": pairs})
        say({"figure": "decoding one fp16 row", **decode_cost(rows)})


def median_ratio(times: list[tuple], to: int, clock: int) -> float:
    return round(statistics.median(row[0][clock] / row[to][clock] for row in times), 3)


def decode_cost(rows: np.ndarray) -> dict:
    """Nanoseconds per row: in blocks, as for the search, and one by one, as for the sums."""
    dim = rows.shape[1]
    codec = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
    codes = rows[: block_rows(dim)].view(np.uint8)
    times = [seconds(lambda: codec.sa_decode(codes))[1] for _ in range(10)]
    one = [seconds(lambda: [codec.sa_decode(codes[:1]) for _ in range(1000)])[1] for _ in range(3)]
    return {
        "dim": dim,
        "in_blocks_ns": round(1e9 * statistics.median(times) / len(codes)),
        "one_by_one_ns_from_python": round(1e6 * statistics.median(one)),
    }


@app.command("memory")
def compare_memory(
    count: int = 20_000_000,
    dim: int = 64,
    k: int = 1024,
    iterations: int = 10,
    memory: str = "1GB",
    threads: int = 2,
    folder: Annotated[Path | None, typer.Option(help="Folder for the sample while the benchmark runs.")] = None,
) -> None:
    """Peak anonymous memory and exact objective, out of core and in memory, each in a separate process."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch, "rows")
        write_rows(path, count, dim)
        results = {}
        for name, budget in (("out of core", memory), ("in memory", "1TB")):
            options = [path, dim, k, iterations, budget, threads]
            child = subprocess.run(
                [sys.executable, __file__, "child", *map(str, options)], check=True, stdout=subprocess.PIPE, text=True
            )
            results[name] = json.loads(child.stdout)
    settings = {"count": count, "dim": dim, "k": k, "iterations": iterations, "memory": memory, "threads": threads}
    ratio = results["out of core"]["objective"] / results["in memory"]["objective"]
    figure = {"figure": "k-means out of core / in memory", "objective_ratio": round(ratio, 6), **results}
    say({**figure, "target": "under 1500 MB of anonymous memory out of core, objective within 1 %", **settings})


@app.command("child", hidden=True)
def child(path: Path, dim: int, k: int, iterations: int, memory: str, threads: int) -> None:
    faiss.omp_set_num_threads(threads)
    rows, settings = open_rows(path, dim), KMeansSettings(k=k, iterations=iterations, restarts=1)
    with peak_of_anonymous_memory() as peak:
        began = time.perf_counter()
        run = train_kmeans(rows, settings, memory=memory_budget(memory))
        took = time.perf_counter() - began
    index = faiss.IndexFlatL2(dim)
    index.add(run.centroids)
    sums = (index.search(block, 1)[0].sum(dtype=np.float64) for block in float_blocks(rows, block_rows(dim)))
    # FAISS's objective is a float32 sum, which drifts over so many rows.
    exact = float(sum(sums))
    say({"peak_anonymous_mb": round(max(peak) / 1e6), "objective": exact, "seconds": round(took, 1)})


@contextmanager
def peak_of_anonymous_memory() -> Iterator[list[int]]:
    """Yields a list of this process's RssAnon in bytes, to which a thread appends twenty times per second."""
    samples, stop = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            samples.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        stop.set()
        watcher.join()
        samples.append(anonymous_bytes())


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def say(figure: dict) -> None:
    print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    app()
