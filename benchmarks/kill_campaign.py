"""Kills build-codebook and encode-shards at random moments, again and again, and compares what they end with.

python benchmarks/kill_campaign.py [--kills 20] [--processes 1 --processes 2] [--command encode-shards]
    [--tokenizer k-clip --tokenizer pixels --tokenizer vqkd --tokenizer dvae]

A command is started, killed with SIGKILL after a random time (under torchrun: one worker, or everything), given again
and killed again, until it finishes; then its files must be those of an undisturbed run, byte for byte, and it starts
over in an empty folder. Prints one JSON line for each command, tokenizer and number of processes; published tokenizers
have random weights and are not built here.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from mapet.quickstart.demo import TOWER
from mapet.quickstart.drawings import write_drawings
from mapet.shared.sources.sources import read_records
from mapet.shared.tokens.store import TokenStore
from published_files import make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from warm import COLD_TORCHRUN, warm_command

# These hold how long something took, the one thing that may differ.
CLOCKS = {"timings.json"}
PUBLISHED = ("vqkd", "dvae")
TOWERS = {"k-clip": ("--tower", f"local-dir:{TOWER}"), "pixels": ("--tower", "pixels:8", "--image-size", 64)}


def main(
    command: Annotated[list[str], typer.Option()] = ["build-codebook", "encode-shards"],  # noqa: B006
    processes: Annotated[list[int], typer.Option()] = [1, 2],  # noqa: B006
    tokenizer: Annotated[list[str], typer.Option()] = ["k-clip"],  # noqa: B006
    kills: int = 20,
    images: int = 1600,
    seed: int = 0,
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on the number of threads
    subprocess.run([*warm_command(), "--version"], check=True, stdout=subprocess.DEVNULL)  # imports
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_drawings(root / "images", images, seed=1, per_tar=images // 16)
        for kind, name in itertools.product(tokenizer, command):
            if name == "build-codebook" and kind in PUBLISHED:
                continue
            codebook = root / f"codebook-{kind}"
            if not codebook.exists():
                make_tokenizer(kind, root / "images", codebook, tower=f"local-dir:{TOWER}")
            arguments = {
                "build-codebook": [*TOWERS.get(kind, ()), "--k", 64, "--restarts", 2, "--iterations", 10],
                "encode-shards": ["--codebook", codebook, "--crop", "random-resized", "--views", 2],
            }
            for count in processes:
                room = root / f"{kind}-{name}-{count}"
                figure = campaign(root, room, name, arguments[name], count, kills, random.Random(seed))
                print(json.dumps({"figure": "kill campaign", "tokenizer": kind, **figure}), flush=True)


def run(root: Path, arguments: list, name: str, out: Path, processes: int) -> subprocess.Popen:
    launch = [*COLD_TORCHRUN, "--standalone", "--nproc-per-node", str(processes), "--no-python"]
    command = [*(launch if processes > 1 else []), *warm_command(), "tokenize", name, root / "images"]
    options = [*arguments, "--out", out, "--batch-size", 8, "--device", "cpu"]
    return subprocess.Popen(
        list(map(str, command + options)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def campaign(
    root: Path, room: Path, name: str, arguments: list, processes: int, kills: int, draw: random.Random
) -> dict:
    began = time.monotonic()
    run(root, arguments, name, room / "whole" / "out", processes).wait()
    seconds = time.monotonic() - began
    expected = contents(room / "whole")
    done = finished = different = strays = 0
    while done < kills:
        process = run(root, arguments, name, room / "killed" / "out", processes)
        try:
            process.wait(draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            kill(process, draw)
            done += 1
            if done < kills:
                continue
            run(root, arguments, name, room / "killed" / "out", processes).wait()
        found = contents(room / "killed")
        finished += 1
        different += any(found.get(path) != data for path, data in expected.items())
        strays += len(found.keys() - expected.keys())
        shutil.rmtree(room / "killed")
    lost = None
    if name == "encode-shards":
        keys = [record.key for record in read_records(root / "images")]
        stored = [key for _, rows in TokenStore(room / "whole" / "out").shards() for key in rows.keys]
        lost = {"lost": len(set(keys) - set(stored)), "doubled": len(stored) - len(set(stored))}
    return {
        "command": name,
        "processes": processes,
        "kills": done,
        "finished": finished,
        "different": different,
        "stray_files": strays,
        "images": lost,
        "seconds_undisturbed": round(seconds, 1),
    }


def kill(process: subprocess.Popen, draw: random.Random) -> None:
    """One worker of torchrun's (torchrun then ends the others), or the whole process group."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    # Each is warm (tests/warm.py): what it stands for is killed with it.
    if children and draw.random() < 0.5:
        os.kill(int(draw.choice(children)), signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in CLOCKS
    }


if __name__ == "__main__":
    typer.run(main)
