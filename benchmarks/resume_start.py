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
from mapet.shared.tokens.rows import ShardRows
from PIL import Image
from startup import write_store

GRID, SIDE = 2, 32
MODEL = ["model.name=null", "model.dim=32", "model.depth=1", "model.heads=2", f"model.image_size={SIDE}"]
MODEL += [f"model.patch_size={SIDE // GRID}", "model.drop_path=0", "train.batch_size=32", "train.log_every=1"]
COMMAND = [sys.executable, "-c", "from mapet.cli import main; main()", "train", "pretrain"]


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (200, 120, 40)).save(content, "JPEG")
    return content.getvalue()


CONTENT = jpeg()


def write_tar(path: Path, rows: ShardRows) -> ShardRows:
    """A tar of the same JPEG under the keys of the rows, which are returned as it demands."""
    offsets = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key in rows.keys:
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(CONTENT)
            offsets.append(tar.offset + tarfile.BLOCKSIZE)
            tar.addfile(member, io.BytesIO(CONTENT))
    count = len(rows)
    return replace(
        rows,
        crops=np.tile(np.array([0.0, 0.0, SIDE, SIDE]), (count, 1, 1)),
        sizes=np.full((count, 2), SIDE, np.int32),
        offsets=np.array(offsets),
        lengths=np.full(count, len(CONTENT)),
        crc32=np.full(count, zlib.crc32(CONTENT), np.uint32),
    )


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
            write_store(place, count, GRID, per_shard, write_tar)
            for figure in ("first run", "resumed", "resumed without kept listings"):
                if figure.endswith("listings"):
                    shutil.rmtree(cache, ignore_errors=True)
                print(json.dumps({"figure": figure, "images": count, **until_a_step(place, cache)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
