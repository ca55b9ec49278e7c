"""How long a resumed pre-training takes until its first step, by the number of images, with the real command.

python benchmarks/resume_start.py [--images 100000 --images 1280000] [--per-shard 1000] [--folder F]

Writes tars of one small JPEG under many keys, and a synthetic store of 2x2 tokens for them. `mapet train pretrain`
begins a run of a tiny model, is stopped after its first step, and is given again; then once more, with the listings of
the tars deleted. One JSON line each: wall seconds from the start of the command to its first logged step, processor
seconds and peak memory of the whole command, which ends after that step.
"""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from inspect_store import describe, rows_of
from mapet.shared.storage.files import write_sealed_json
from mapet.shared.tokens.store import read_entry, write_manifest, write_shard
from PIL import Image

GRID, K, SIDE = 2, 64, 32
VIEW = {"crop": "random-resized", "views": 1, "scale": [0.2, 1.0], "ratio": [0.75, 1.33], "flip": 0.5, "seed": 0}
MODEL = ["model.name=null", "model.dim=32", "model.depth=1", "model.heads=2", f"model.image_size={SIDE}"]
MODEL += [f"model.patch_size={SIDE // GRID}", "model.drop_path=0", "train.batch_size=32", "train.log_every=1"]
COMMAND = [sys.executable, "-c", "from mapet.cli import main; main()", "train", "pretrain"]


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (200, 120, 40)).save(content, "JPEG")
    return content.getvalue()


def write_all(folder: Path, images: int, per_shard: int) -> None:
    """FOLDER/images, tars of the same JPEG, and FOLDER/tokens, a store of their keys."""
    book, content, store = describe(GRID, K), jpeg(), folder / "tokens"
    store.mkdir(parents=True)
    (folder / "images").mkdir()
    write_sealed_json(store / "codebook.json", book.as_json("0" * 64))
    names = [f"train-{number:06d}" for number in range(-(-images // per_shard))]
    for number, name in enumerate(names):
        count = min(per_shard, images - number * per_shard)
        rows = rows_of(number, count, 1, GRID, K, 1000)
        tar = folder / "images" / f"{name}.tar"
        offsets = write_tar(tar, rows.keys, content)
        rows = replace(
            rows,
            crops=np.tile(np.array([0.0, 0.0, SIDE, SIDE]), (count, 1, 1)),
            sizes=np.full((count, 2), SIDE, np.int32),
            offsets=offsets,
            lengths=np.full(count, len(content)),
            crc32=np.full(count, zlib.crc32(content), np.uint32),
        )
        attributes = {
            "codebook_fingerprint": book.fingerprint,
            "view": {**VIEW, "with_center": False},
            "source": {"kind": "tar", "size": tar.stat().st_size, "sha256": "0" * 64},
        }
        write_shard(store, name, rows, attributes)
    write_manifest(store, {**book.description, "fingerprint": book.fingerprint}, [read_entry(store, n) for n in names])


def write_tar(path: Path, keys: np.ndarray, content: bytes) -> np.ndarray:
    """Returns the offsets of the images."""
    offsets = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key in keys:
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(content)
            offsets.append(tar.offset + tarfile.BLOCKSIZE)
            tar.addfile(member, io.BytesIO(content))
    return np.array(offsets)


def until_a_step(folder: Path, cache: Path) -> dict[str, float]:
    """Gives the command, waits for the next line of the log, and stops it."""
    log = folder / "run" / "metrics.jsonl"
    before, lines = resource.getrusage(resource.RUSAGE_CHILDREN), count_lines(log)
    options = ["--images", folder / "images", "--tokens", folder / "tokens", "--out", folder / "run", "--device", "cpu"]
    settings = [word for pair in MODEL for word in ("--set", pair)]
    began = time.perf_counter()
    with (folder / "log.txt").open("w") as said:
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        process = subprocess.Popen([*COMMAND, *options, *settings], stderr=said, env=environment)
        while count_lines(log) == lines and process.poll() is None:
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
        process.wait()
    if count_lines(log) == lines:
        raise SystemExit((folder / "log.txt").read_text())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_mb": round(used.ru_maxrss / 1024)}


def count_lines(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def main(
    images: Annotated[list[int], typer.Option()] = [100_000, 1_280_000],  # noqa: B006
    per_shard: int = 1000,
    folder: Path | None = None,
) -> None:
    for count in images:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            place, cache = Path(root), Path(root, "cache")
            write_all(place, count, per_shard)
            for figure in ("first run", "resumed", "resumed without kept listings"):
                if figure.endswith("listings"):
                    shutil.rmtree(cache, ignore_errors=True)
                print(json.dumps({"figure": figure, "images": count, **until_a_step(place, cache)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
