"""Start-up at scale: opening a store and a source, the join, verify; seconds and memory by the number of images.

python benchmarks/startup.py [--images 100000 --images 1280000] [--part join] [--grid 2] [--per-shard 1000] [--folder F]

Writes a synthetic store in the real format and, as its source, tars of the right names and sizes without images (of
a tar of known name and size only the first member is looked at). Parts: `store` (opening the manifest), `source`
(`open_source`), `join` (with both), `verify` (every shard's checksum and keys), `listing` (a tar of other size than the
store's, so that its headers are read: `--most-listed` images at most, of 512 bytes each). Each runs in a process of its
own and prints a JSON line: wall and processor seconds, the peak of resident memory above that of the imports, and
bytes and microseconds of processor time per image. On a busy machine only the processor's time means something.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from inspect_store import describe, rows_of
from mapet.shared.storage.files import write_sealed_json
from mapet.shared.tokens.rows import ShardRows
from mapet.shared.tokens.store import read_entry, write_manifest, write_shard

K, IMAGE_BYTES = 64, 1 << 18
"""No image of `rows_of` has more bytes; the tars are sparse files."""
WriteTar = Callable[[Path, ShardRows], ShardRows]
"""Writes the tar of a shard, and returns the shard's rows."""
VIEW = {"crop": "random-resized", "views": 1, "scale": [0.2, 1.0], "ratio": [0.75, 1.33], "flip": 0.5, "seed": 0}
MEASURED = """
import cProfile, json, pstats, resource, sys, time
from mapet.shared.sources.sources import open_source
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.verify import verify
from mapet.train_stage.data.join import join
part, tokens, images, profiled = sys.argv[1:]
task = {
    "store": lambda: TokenStore(tokens),
    "source": lambda: open_source(images),
    "join": lambda: join(images, TokenStore(tokens)),
    "listing": lambda: join(images, TokenStore(tokens)),
    "verify": lambda: verify(tokens),
}[part]
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, began, worked = memory(), time.perf_counter(), time.process_time()
profile = cProfile.Profile()
profile.runcall(task) if profiled == "True" else task()
print(json.dumps({"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked,
                  "bytes": memory() - before}))
if profiled == "True":
    pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(20)
"""


def write_store(folder: Path, images: int, grid: int, per_shard: int, write_tar: WriteTar) -> None:
    """The store FOLDER/tokens, and its tars in FOLDER/images."""
    book, store = describe(grid, K), folder / "tokens"
    store.mkdir(parents=True)
    (folder / "images").mkdir()
    write_sealed_json(store / "codebook.json", book.as_json("0" * 64))
    names = [f"train-{number:06d}" for number in range(-(-images // per_shard))]
    for number, name in enumerate(names):
        count, tar = min(per_shard, images - number * per_shard), folder / "images" / f"{name}.tar"
        rows = write_tar(tar, rows_of(number, count, 1, grid, K, 1000))
        attributes = {
            "codebook_fingerprint": book.fingerprint,
            "view": {**VIEW, "with_center": False},
            "source": {"kind": "tar", "size": tar.stat().st_size, "sha256": "0" * 64},
        }
        write_shard(store, name, rows, attributes)
    write_manifest(store, {**book.description, "fingerprint": book.fingerprint}, [read_entry(store, n) for n in names])


def write_sparse_tar(path: Path, rows: ShardRows) -> ShardRows:
    """A tar of the size that the rows need, without images."""
    with tarfile.open(path, "w") as tar:  # a source's first member is looked at
        tar.addfile(tarfile.TarInfo("first.jpg"))
    os.truncate(path, len(rows) * IMAGE_BYTES)
    return rows


def write_listed(folder: Path, images: int, per_shard: int) -> None:
    """Tars in FOLDER/listed with the keys of the store, whose sizes are not those that the store has recorded."""
    (folder / "listed").mkdir()
    for number in range(-(-images // per_shard)):
        with tarfile.open(folder / "listed" / f"train-{number:06d}.tar", "w") as tar:
            for at in range(min(per_shard, images - number * per_shard)):
                member = tarfile.TarInfo(f"n{number:06d}/{number:06d}_{at:05d}.jpg")
                member.size = 512
                tar.addfile(member, io.BytesIO(b"\0" * 512))


def measured(part: str, folder: Path, images: int, profile: bool) -> dict:
    source = folder / ("listed" if part == "listing" else "images")
    command = [sys.executable, "-c", MEASURED, part, folder / "tokens", source, str(profile)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode or profile:
        sys.stderr.write(result.stderr)
    result.check_returncode()
    found = json.loads(result.stdout.splitlines()[-1])
    return {
        "seconds": round(found["seconds"], 2),
        "cpu_seconds": round(found["cpu_seconds"], 2),
        "peak_mb": round(found["bytes"] / 1e6),
        "bytes_per_image": round(found["bytes"] / images, 1),
        "cpu_us_per_image": round(1e6 * found["cpu_seconds"] / images, 2),
    }


def main(
    images: Annotated[list[int], typer.Option()] = [100_000, 1_280_000],  # noqa: B006
    part: Annotated[list[str], typer.Option()] = ["store", "source", "join", "verify", "listing"],  # noqa: B006
    grid: int = 2,
    per_shard: int = 1000,
    most_listed: int = 100_000,
    profile: Annotated[bool, typer.Option(help="Print where the time goes to stderr.")] = False,
    folder: Path | None = None,
) -> None:
    for count in images:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            write_store(Path(root), count, grid, per_shard, write_sparse_tar)
            if "listing" in part and count <= most_listed:
                write_listed(Path(root), count, per_shard)
            for one in part:
                if one != "listing" or count <= most_listed:
                    about = {"figure": f"start-up: {one}", "images": count, "shards": -(-count // per_shard)}
                    print(json.dumps({**about, **measured(one, Path(root), count, profile)}), flush=True)


if __name__ == "__main__":
    typer.run(main)
