"""Compares encode-shards with the bare tower, assignment with faiss.knn, and verify with hashing; measures memory.

python benchmarks/encode.py SOURCE [--part speed] [--tower ViT-B-16] [--k 1024] [--threads 2] [--pairs 5] [--workers 0]
    [--tokenizer k-clip --tokenizer pixels --tokenizer vqkd --tokenizer dvae]

SOURCE is a tar of photographs. Parts: `speed` (Encoder and shard writing, from bytes to rows, against the tokenizer's
forward pass alone on the same images, already decoded, and against this pass after loading; published tokenizers have
their published sizes), `assign` (Codebook.assign against faiss.knn), `verify` (MB/s of `mapet tokenize verify` against
reading and hashing the same bytes), `memory` (peak of encode-shards with 2, 8 and 64 shards). Prints one JSON line per
metric: medians over interleaved pairs of ours and the reference.
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
from functools import partial
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import torch
import typer
from mapet.quickstart.demo import TOWER
from mapet.quickstart.drawings import write_drawings
from mapet.shared.images.views import CENTER
from mapet.shared.runtime.console import running_command
from mapet.shared.runtime.devices import choose_device
from mapet.shared.sources.sources import open_source
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.store import write_shard
from mapet.throughput.tokenizing import ready_pixels, with_random_codes
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.encoding.shards import Encoder
from mapet.tokenize_stage.tokenizers.base import Tokenizer
from mapet.tokenize_stage.tokenizers.nearest_code import NearestCode
from mapet.tokenize_stage.tokenizers.opening import read_tokenizer
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import TowerSettings
from mapet.tokenize_stage.verify import verify
from published_files import PUBLISHED, make_tokenizer

START = [sys.executable, "-c", "from mapet.cli import main; main()", "tokenize"]


def main(
    source: str,
    part: Annotated[list[str], typer.Option()] = ["speed", "assign", "verify", "memory"],  # noqa: B006
    tokenizer: Annotated[list[str], typer.Option()] = ["k-clip"],  # noqa: B006
    tower: str = "ViT-B-16",
    k: int = 1024,
    batch_size: int = 16,
    threads: int = 2,
    workers: Annotated[list[int], typer.Option()] = [0, 1],  # noqa: B006
    pairs: int = 5,
) -> None:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    settings = {"threads": threads, "device": choose_device("auto"), "pairs": pairs}
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in part:
            for kind in tokenizer:
                opened = open_tokenizer(kind, source, tower, k, Path(folder), settings["device"])
                for count in workers:
                    values = speed(source, opened, batch_size, count, pairs, Path(folder))
                    details = {"tokenizer": kind, "tower": opened.description["tower"], "k": opened.k, "workers": count}
                    say("encode-shards / bare tower, images/s", settings | details, values)
        if "assign" in part:
            say("assignment / faiss.knn, time", settings | {"k": k}, assignment(k, pairs))
        if "verify" in part or "memory" in part:
            root = drawings(Path(folder))
            if "verify" in part:
                say("verify / read and hash, MB/s", settings, verifying(root, pairs))
            if "memory" in part:
                say("peak of encode-shards by shards", {"threads": 1}, memory(root))


def say(metric: str, settings: dict, values: dict) -> None:
    print(json.dumps({"figure": metric, **settings, **values}), flush=True)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ratio(ours: Callable[[], object], reference: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Medians of (reference time / our time, our seconds, reference seconds), pairs interleaved, after a warm-up."""
    ours(), reference()
    times = [(seconds(ours), seconds(reference)) for _ in range(pairs)]
    our_seconds, reference_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return statistics.median(b / a for a, b in times), our_seconds, reference_seconds


def open_tokenizer(kind: str, source: str | Path, tower: str, k: int, folder: Path, device: str) -> Tokenizer:
    """A tokenizer with random weights, or with random patches of some images as centroids."""
    if kind in ("vqkd", "dvae"):
        make_tokenizer(kind, Path(source), folder / kind, PUBLISHED)
        return read_tokenizer(folder / kind).open(device=device)
    opened = open_tower(TowerSettings("pixels") if kind == "pixels" else TowerSettings(tower, "none"), device)
    (shard,) = open_source(source)
    return with_random_codes(opened, k, ready_pixels(shard.index()[:16], opened.preprocess))


def speed(source: str | Path, tokenizer: Tokenizer, batch_size: int, workers: int, pairs: int, folder: Path) -> dict:
    (shard,) = open_source(source)
    records = shard.index()
    pixels = ready_pixels(records[: len(records) // batch_size * batch_size], tokenizer.preprocess)
    encoder = Encoder(tokenizer, CENTER, False, batch_size, workers)

    def ours() -> None:
        for encoded in encoder.encode([shard], lambda name: None, lambda steps: None):
            write_shard(folder, encoded.name, encoded.rows, {"source": encoded.source})

    layer = last_layer(tokenizer)

    def bare() -> None:
        for batch in pixels.split(batch_size):
            features = tokenizer.features(batch)
            (features if layer is None else layer(features).argmax(-1)).cpu()

    speed_ratio, our_seconds, bare_seconds = ratio(ours, bare, pairs)
    loading_seconds = statistics.median(
        seconds(lambda: ready_pixels(records, tokenizer.preprocess)) for _ in range(pairs)
    )
    # Ours also encodes the last images, which do not fill a batch.
    share = len(records) / len(pixels)
    return {
        "ratio": round(speed_ratio * share, 3),
        "target": "at least 0.95",
        "images_per_second": round(len(records) / our_seconds, 2),
        "bare_images_per_second": round(len(pixels) / bare_seconds, 2),
        "loading_images_per_second": round(len(records) / loading_seconds, 2),
        "ratio_to_loading_and_tower": round((loading_seconds + bare_seconds * share) / our_seconds, 3),
        "batch_size": batch_size,
    }


def last_layer(tokenizer: Tokenizer) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The last convolution of a published dVAE, which belongs to its encoder; `assign` computes it for us."""
    if not isinstance(tokenizer, NearestCode) or tokenizer.codebook.bias is None:
        return None
    weight, bias = (torch.from_numpy(values) for values in (tokenizer.codebook.centroids, tokenizer.codebook.bias))
    return partial(torch.nn.functional.linear, weight=weight.to(tokenizer.device), bias=bias.to(tokenizer.device))


def assignment(k: int, pairs: int) -> dict:
    random = np.random.default_rng(0)
    centroids, features = (random.normal(size=(n, 768)).astype(np.float32) for n in (k, 64 * 196))
    codebook = Codebook(centroids, np.zeros(k, np.int64), {"metric": "l2"})
    speed_ratio, our_seconds, knn_seconds = ratio(
        lambda: codebook.assign(features), lambda: faiss.knn(features, centroids, 1), pairs
    )
    same = np.array_equal(codebook.assign(features)[0], faiss.knn(features, centroids, 1)[1][:, 0])
    return {
        "time_ratio": round(1 / speed_ratio, 3),
        "our_ms": round(our_seconds * 1e3, 1),
        "knn_ms": round(knn_seconds * 1e3, 1),
        "equal": same,
    }


def drawings(folder: Path) -> Path:
    write_drawings(folder / "images", 3200, seed=1, per_tar=50)
    build_codebook(folder / "images", folder / "codebook", tower=f"local-dir:{TOWER}", k=64, restarts=1, patches=20_000)
    encode_shards(folder / "images", folder / "codebook", folder / "tokens")
    return folder


def verifying(root: Path, pairs: int) -> dict:
    files = [path for folder in ("tokens", "images") for path in (root / folder).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)

    def bare() -> None:
        for path in files:
            with open(path, "rb") as file:
                hashlib.file_digest(file, "sha256").hexdigest()

    speed_ratio, our_seconds, hash_seconds = ratio(
        lambda: verify(root / "tokens", codebook=root / "codebook", images=str(root / "images")), bare, pairs
    )
    return {
        "ratio": round(speed_ratio, 3),
        "mb_per_second": round(size / our_seconds / 1e6, 1),
        "hash_mb_per_second": round(size / hash_seconds / 1e6, 1),
        "mb": round(size / 1e6, 1),
    }


def memory(root: Path) -> dict:
    tars = sorted((root / "images").glob("*.tar"))
    peaks = {}
    for count in (2, 8, 64):
        subset = root / f"images-{count}"
        subset.mkdir()
        for tar in tars[:count]:
            shutil.copy(tar, subset)
        command = [*START, "encode-shards", subset, "--codebook", root / "codebook", "--out", root / f"tokens-{count}"]
        peaks[count] = peak_mb(list(map(str, [*command, "--device", "cpu"])))
    return {"peak_mb_by_shards": peaks}


def peak_mb(command: list[str]) -> float:
    """Peak resident memory of a command in MB, as the kernel reports it to a process that runs nothing else."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return round(int(result.stdout) / 1024, 1)


if __name__ == "__main__":
    with running_command():  # measured as the command runs, with its allocator settings
        typer.run(main)
