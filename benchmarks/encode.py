"""encode-shards beside the bare tower, assignment beside faiss.knn, verify in MB/s, memory by number of shards.

python benchmarks/encode.py SOURCE [--part speed] [--tower ViT-B-16] [--k 1024] [--threads 2] [--pairs 5] [--workers 0]

SOURCE is a tar of photographs. Parts: `speed` (Encoder and shard writing, from bytes to rows, against the tower's
forward pass alone on the same images, already decoded), `assign` (Codebook.assign against faiss.knn), `verify`
(MB/s of `mapet tokenize verify` against reading and hashing the same bytes), `memory` (peak of encode-shards with 2, 8
and 64 shards). Prints one JSON line per figure; references in the same run, pairs interleaved, medians.
"""

import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import torch
import typer
from mapet.quickstart.demo import TOWER
from mapet.quickstart.drawings import write_drawings
from mapet.shared.images.decode import read_image
from mapet.shared.images.sources import open_source
from mapet.shared.images.views import CENTER, center_view, to_array
from mapet.shared.runtime.console import running_command
from mapet.shared.runtime.devices import choose_device
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.store import write_shard
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.encoding.shards import Encoder
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import TowerSettings
from mapet.tokenize_stage.verify import verify

START = [sys.executable, "-c", "from mapet.cli import main; main()", "tokenize"]


def main(
    source: str,
    part: Annotated[list[str], typer.Option()] = ["speed", "assign", "verify", "memory"],  # noqa: B006
    tower: str = "ViT-B-16",
    k: int = 1024,
    batch_size: int = 16,
    threads: int = 2,
    workers: Annotated[list[int], typer.Option()] = [0, 1],  # noqa: B006
    pairs: int = 5,
) -> None:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    about = {"threads": threads, "device": choose_device("auto"), "pairs": pairs}
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in part:
            for count in workers:
                figure = speed(source, tower, k, batch_size, count, pairs, Path(folder), about["device"])
                say("encode-shards / bare tower, images/s", about | {"tower": tower, "k": k, "workers": count}, figure)
        if "assign" in part:
            say("assignment / faiss.knn, time", about | {"k": k}, assignment(k, pairs))
        if "verify" in part or "memory" in part:
            made = drawings(Path(folder))
            if "verify" in part:
                say("verify / read and hash, MB/s", about, verifying(made, pairs))
            if "memory" in part:
                say("peak of encode-shards by shards", {"threads": 1}, memory(made))


def say(figure: str, about: dict, values: dict) -> None:
    print(json.dumps({"figure": figure, **about, **values}), flush=True)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ratio(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Medians of (their time / our time, our seconds, their seconds) over interleaved pairs, after one warm-up."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    mine, reference = (statistics.median(column) for column in zip(*times, strict=True))
    return statistics.median(b / a for a, b in times), mine, reference


def speed(
    source: str | Path, name: str, k: int, batch_size: int, workers: int, pairs: int, folder: Path, device: str
) -> dict:
    tower = open_tower(TowerSettings(name, "none"), device)
    random = np.random.default_rng(0)
    (shard,) = open_source(source)
    records = shard.index()
    records = records[: len(records) // batch_size * batch_size]
    pixels = torch.stack(
        [torch.from_numpy(to_array(center_view(read_image(record)[0], tower.preprocess))) for record in records]
    )
    some = tower.features(pixels[:batch_size]).flatten(0, 1).cpu().numpy()
    centroids = some[random.integers(0, len(some), k)] + random.normal(0, 0.1, (k, tower.dim)).astype(np.float32)
    book = Codebook(np.ascontiguousarray(centroids), np.zeros(k, np.int64), {"metric": "l2"})
    encoder = Encoder(book, tower, CENTER, False, batch_size, workers)

    def ours() -> None:
        for one in encoder.encode([shard], lambda name: None, lambda steps: None):
            write_shard(folder, one.name, one.rows, {"source": one.source})

    def bare() -> None:
        for batch in pixels.split(batch_size):
            tower.features(batch).cpu()

    found, mine, theirs = ratio(ours, bare, pairs)
    # Ours also encodes what does not fill a batch.
    share = len(shard.index()) / len(records)
    return {
        "ratio": round(found * share, 3),
        "target": "at least 0.95",
        "images_per_second": round(len(shard.index()) / mine, 2),
        "bare_images_per_second": round(len(records) / theirs, 2),
        "batch_size": batch_size,
    }


def assignment(k: int, pairs: int) -> dict:
    random = np.random.default_rng(0)
    centroids, features = (random.normal(size=(n, 768)).astype(np.float32) for n in (k, 64 * 196))
    book = Codebook(centroids, np.zeros(k, np.int64), {"metric": "l2"})
    found, mine, theirs = ratio(lambda: book.assign(features), lambda: faiss.knn(features, centroids, 1), pairs)
    same = np.array_equal(book.assign(features)[0], faiss.knn(features, centroids, 1)[1][:, 0])
    return {
        "time_ratio": round(1 / found, 3),
        "our_ms": round(mine * 1e3, 1),
        "knn_ms": round(theirs * 1e3, 1),
        "equal": same,
    }


def drawings(folder: Path) -> Path:
    write_drawings(folder / "images", 3200, seed=1, per_tar=50)
    build_codebook(folder / "images", folder / "codebook", tower=f"local-dir:{TOWER}", k=64, restarts=1, patches=20_000)
    encode_shards(folder / "images", folder / "codebook", folder / "tokens")
    return folder


def verifying(made: Path, pairs: int) -> dict:
    files = [path for place in ("tokens", "images") for path in (made / place).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)

    def bare() -> None:
        for path in files:
            with open(path, "rb") as file:
                hashlib.file_digest(file, "sha256").hexdigest()

    found, mine, theirs = ratio(
        lambda: verify(made / "tokens", codebook=made / "codebook", images=str(made / "images")), bare, pairs
    )
    return {
        "ratio": round(found, 3),
        "mb_per_second": round(size / mine / 1e6, 1),
        "hash_mb_per_second": round(size / theirs / 1e6, 1),
        "mb": round(size / 1e6, 1),
    }


def memory(made: Path) -> dict:
    tars = sorted((made / "images").glob("*.tar"))
    peaks = {}
    for count in (2, 8, 64):
        some = made / f"some-{count}"
        some.mkdir()
        for tar in tars[:count]:
            shutil.copy(tar, some)
        command = [*START, "encode-shards", some, "--codebook", made / "codebook", "--out", made / f"tokens-{count}"]
        peaks[count] = peak_mb(list(map(str, [*command, "--device", "cpu"])))
    return {"peak_mb_by_shards": peaks}


def peak_mb(command: list[str]) -> float:
    """Peak resident memory of a command, from the kernel's account of the child that waited for it alone."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return round(int(result.stdout) / 1024, 1)


if __name__ == "__main__":
    with running_command():  # measured as the command runs, with its allocator settings
        typer.run(main)
