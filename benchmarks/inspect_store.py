"""Compares `inspect` of a large store with just reading the store's rows.

python benchmarks/inspect_store.py [--images 1280000] [--views 1] [--grid 14] [--k 8192] [--classes 1000] [--folder F]

Writes a synthetic store in the real format (1,000 images per shard, neighbouring patches often alike), prints one JSON
line each for reading every shard (with all checks), for `inspect`, and for their ratio, and deletes the store. Each is
measured in a separate process: seconds, and the peak of resident memory.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import typer
from mapet.shared.storage.files import write_sealed_json
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import ShardRows
from mapet.shared.tokens.store import read_entry, write_manifest, write_shard

PER_SHARD = 1000
MEASURED = """
import json, resource, sys, time
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.inspect import inspect
began = time.perf_counter()
if sys.argv[1] == "read":
    images = sum(len(rows) for _, rows in TokenStore(sys.argv[2]).shards())
else:
    images = inspect(sys.argv[2])["images"]
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"images": images, "seconds": round(seconds, 2), "peak_rss_mb": round(peak)}))
"""


def describe(grid: int, k: int) -> Codebook:
    """A codebook of random centroids with a complete description."""
    side = 16 * grid
    preprocess = {"image_size": side, "resize": "shortest", "resize_size": side, "interpolation": "bicubic"}
    description = {
        "library": "none",
        "architecture": "none",
        "tower": "synthetic",
        "pretrained": None,
        "weights_sha256": "0" * 64,
        "layer": -1,
        "final_norm": False,
        "precision": "float32",
        "preprocess": {**preprocess, "mean": [0.5] * 3, "std": [0.5] * 3},
        "grid": [grid, grid],
        "metric": "l2",
        "k": k,
        "dim": 4,
        "imported": {"name": "synthetic", "sha256": "0" * 64},
    }
    return Codebook(np.random.default_rng(0).random((k, 4), dtype=np.float32), np.zeros(k, np.int64), description)


def rows_of(number: int, count: int, views: int, grid: int, k: int, classes: int) -> ShardRows:
    """The rows of a shard: codes of unequal frequency; a third of the patches have the code of their left neighbour."""
    random = np.random.default_rng(number)
    tokens = (k * random.random((count, views, grid, grid), dtype=np.float32) ** 1.5).astype(np.uint16)
    like_left = random.random((count, views, grid, grid - 1), dtype=np.float32) < 1 / 3
    tokens[..., 1:] = np.where(like_left, tokens[..., :-1], tokens[..., 1:])
    corners = random.random((count, views, 2)) * 100
    sides = np.full((count, views, 2), 250.0)
    names = np.array([f"n{number:06d}/{number:06d}_{at:05d}" for at in range(count)], dtype=object)
    return ShardRows(
        keys=names,
        tokens=tokens,
        crops=np.concatenate([corners, sides], axis=2),
        flips=random.random((count, views)) < 0.5,
        sizes=random.integers(300, 600, (count, 2)).astype(np.int32),
        labels=random.integers(0, classes, count),
        paths=np.full(count, "", dtype=object),
        offsets=np.cumsum(random.integers(50_000, 200_000, count)),
        lengths=random.integers(50_000, 200_000, count),
        crc32=random.integers(0, 2**32, count).astype(np.uint32),
    )


def write_store(path: Path, images: int, views: int, grid: int, k: int, classes: int) -> None:
    book = describe(grid, k)
    write_sealed_json(path / "codebook.json", book.as_json("0" * 64))
    view = {"crop": "random-resized", "views": views, "scale": [0.2, 1.0], "ratio": [0.75, 1.33], "flip": 0.5}
    names = [f"train-{number:06d}" for number in range(-(-images // PER_SHARD))]
    for number, name in enumerate(names):
        attributes = {
            "codebook_fingerprint": book.fingerprint,
            "view": {**view, "seed": 0, "with_center": False},
            "source": {"kind": "tar", "size": None, "sha256": "0" * 64},
        }
        count = min(PER_SHARD, images - number * PER_SHARD)
        write_shard(path, name, rows_of(number, count, views, grid, k, classes), attributes)
    write_manifest(path, {**book.description, "fingerprint": book.fingerprint}, [read_entry(path, n) for n in names])


def measured(task: str, path: Path) -> dict:
    result = subprocess.run([sys.executable, "-c", MEASURED, task, path], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout)


def main(
    images: int = 1_280_000,
    views: int = 1,
    grid: int = 14,
    k: int = 8192,
    classes: int = 1000,
    folder: Path | None = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = Path(place) / "tokens"
        began = time.perf_counter()
        write_store(store, images, views, grid, k, classes)
        size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
        settings = {"views": views, "grid": grid, "k": k, "store_mb": round(size / 1e6)}
        print(json.dumps({"figure": "write", "seconds": round(time.perf_counter() - began, 1), **settings}), flush=True)
        results = {task: measured(task, store) for task in ("read", "inspect")}
    for task, metrics in results.items():
        print(json.dumps({"figure": task, **metrics}))
    ratio = results["inspect"]["seconds"] / max(results["read"]["seconds"], 0.01)
    print(json.dumps({"figure": "ratio", "times": round(ratio, 2)}))


if __name__ == "__main__":
    typer.run(main)
