"""Starts every writing command twice at the same time on one output, again and again, and counts what goes wrong.

python benchmarks/two_writers.py [--pairs 20] [--command pretrain] [--arguments same --arguments different]

Each command is first run alone with the arguments of either process; the output of a pair must be that of one of them,
byte for byte (times apart). Prints one JSON line for each command and kind of arguments: how many pairs left a mixture
of both (mixed), the output of neither (lost), or the second one's after the first had finished (overwritten), and how
many of the second processes waited for the first one, or were refused with its name. Exit code 1 if any went wrong.

The processes are forked from a server that has imported the package (multiprocessing's forkserver), so that two of a
pair reach the output within milliseconds of each other and a pair takes a second.
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from mapet import cli
from mapet.quickstart.demo import TOWER
from mapet.quickstart.drawings import write_drawings
from mapet.shared.sources.sources import read_records

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["mapet.cli", "mapet.quickstart.demo", "mapet.train_stage.finetune"])
TINY = {"model.name": "null", "model.dim": 32, "model.depth": 1, "model.heads": 2, "model.image_size": 64}
TINY |= {"model.patch_size": 8, "train.batch_size": 16, "train.epochs": 1, "optimizer.warmup_epochs": 0}
SETTINGS = " ".join(f"--set {key}={value}" for key, value in TINY.items())
FINETUNE = "--set train.batch_size=16 --set train.epochs=1 --set optimizer.warmup_epochs=0"
BUILD = f"tokenize build-codebook images --tower local-dir:{TOWER} --restarts 1 --iterations 2"
IMPORT = "tokenize import"

COMMANDS = {
    # name: (command, arguments of the first process, other arguments of the second one)
    "build-codebook": (BUILD, "--k 16", "--k 8"),
    "features-cache": (f"{BUILD} --k 8 --features-cache {{out}}-cache", "", "--seed 1"),
    "encode-shards": ("tokenize encode-shards images", "--codebook codebook", "--codebook other-codebook"),
    "import-codebook": (f"{IMPORT} --tower local-dir:{TOWER}", "--centroids a.npy", "--centroids b.npy"),
    "import-tokens": (f"{IMPORT} --csv a.csv --images images --codebook codebook", "--tokens 0.npy", "--tokens 1.npy"),
    "inspect": ("tokenize inspect", "tokens", "codebook"),
    "pretrain": (f"train pretrain --images images --tokens tokens {SETTINGS}", "", "--set train.seed=5"),
    "features": ("train features images", "--weights run", "--weights other-run"),
    "export": ("train export", "run", "other-run"),
    "import-weights": ("train import", "run", "other-run"),
    "report": ("train report", "run", "other-run"),
    "finetune": (f"train finetune run --images images --val images {FINETUNE}", "", "--set train.seed=5"),
}
PAGES = ("inspect", "report")
"""These write a file with --html."""
CLOCKS = {"timings.json", "run.json"}
TIMES = {"images_per_second", "data_wait", "memory_mb", "mfu"}
LOGS = {"metrics.jsonl", "probe.jsonl"}


def main(
    command: Annotated[list[str], typer.Option()] = list(COMMANDS),  # noqa: B006
    arguments: Annotated[list[str], typer.Option()] = ["same", "different"],  # noqa: B006
    pairs: int = 20,
    images: int = 64,
    seed: int = 0,
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # bits depend on the number of threads
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, images)
        for name, kind in itertools.product(command, arguments):
            figure = compete(root, name, kind, pairs, random.Random(seed))
            faults += figure["mixed"] + figure["lost"] + figure["overwritten"] + figure["tracebacks"]
            print(json.dumps(figure), flush=True)
    raise typer.Exit(1 if faults else 0)


def prepare(root: Path, images: int) -> None:
    """The inputs of all commands."""
    write_drawings(root / "images", images, seed=1, per_tar=images // 4)
    alone(root, f"{BUILD} --k 16", "codebook")
    alone(root, f"{BUILD} --k 16 --seed 3", "other-codebook")
    alone(root, "tokenize encode-shards images --codebook codebook", "tokens")
    alone(root, f"train pretrain --images images --tokens tokens {SETTINGS}", "run")
    alone(root, f"train pretrain --images images --tokens tokens {SETTINGS} --set train.seed=9", "other-run")
    codebook = json.loads((root / "codebook" / "codebook.json").read_text())
    (height, width), draw = codebook["grid"], np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(root / f"{name}.npy", draw.normal(size=(8, codebook["dim"])).astype(np.float32))
    for name in ("0", "1"):
        np.save(root / f"{name}.npy", draw.integers(0, 16, (images, height * width)))
    keys = [record.key for record in read_records(root / "images")]
    (root / "a.csv").write_text("".join(f"{key}\n" for key in ["key", *keys]))


def start(root: Path, command: str, out: Path, name: str) -> tuple[Any, Path]:
    """The process of a command, started, and the file that gets its stderr."""
    option = "--html" if name in PAGES else "--out"
    _, printed = tempfile.mkstemp(".txt", dir=root)
    words = ["mapet", *command.format(out=out).split(), option, str(out)]
    process = FORKSERVER.Process(target=run, args=(words, str(root), printed))
    process.start()
    return process, Path(printed)


def run(words: list[str], folder: str, printed: str) -> None:
    """Runs a command in this process as the command line does."""
    os.chdir(folder)
    sys.argv = words
    with open(os.devnull, "w") as nothing, open(printed, "w") as file:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
    cli.main()


def end(process: Any, printed: Path) -> tuple[str, int]:
    """What a process printed on stderr, and its exit code."""
    process.join()
    text = printed.read_text()
    printed.unlink()
    return text, process.exitcode


def alone(root: Path, command: str, out: str, name: str = "") -> None:
    text, code = end(*start(root, command, root / out, name))
    if code:
        raise SystemExit(f"{command} failed alone: {text}")


def compete(root: Path, name: str, kind: str, pairs: int, draw: random.Random) -> dict:
    command, first, second = COMMANDS[name]
    both = [f"{command} {first}", f"{command} {first if kind == 'same' else second}"]
    room = root / f"{name}-{kind}"
    expected = []
    for number, one in enumerate(dict.fromkeys(both)):
        alone(root, one, f"{room.name}/alone-{number}/out", name)
        expected.append(contents(room / f"alone-{number}" / "out"))
        shutil.rmtree(room / f"alone-{number}")
    counts = dict.fromkeys(("mixed", "lost", "overwritten", "waited", "refused", "tracebacks"), 0)
    began = time.monotonic()
    for _ in range(pairs):
        out = room / "pair" / "out"
        started = []
        for one in both:
            started.append(start(root, one, out, name))
            time.sleep(draw.choice([0, 0, 0.02, 0.05, 0.5]))
        ended = [end(*one) for one in started]
        found = contents(out)
        matches = [found == one for one in expected]
        succeeded = [code == 0 for _, code in ended]
        counts["tracebacks"] += sum("Traceback" in text for text, _ in ended)
        counts["waited"] += any("Waiting up to a minute" in text for text, _ in ended)
        counts["refused"] += sum(code in (1, 2) and "mapet: " in text for text, code in ended)
        counts["lost"] += not any(succeeded) or not found
        counts["mixed"] += bool(found) and not any(matches)
        if kind == "different" and name not in PAGES:  # a page may be replaced by the next one
            counts["overwritten"] += all(succeeded)
        if not any(succeeded):
            print("\n".join(text for text, _ in ended), file=sys.stderr)
        shutil.rmtree(room / "pair", ignore_errors=True)
    figure = {"figure": "two writers", "command": name, "arguments": kind, "pairs": pairs, **counts}
    return {**figure, "seconds": round(time.monotonic() - began, 1)}


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of an output without times, host names and the path of the output itself."""
    if out.is_file():
        return {"": neutral(out.read_bytes(), out)}
    files = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        if path.name in CLOCKS or "tensorboard" in path.parts:
            continue
        data = path.read_bytes()
        if path.name in LOGS:
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in line.items() if k not in TIMES} for line in lines]).encode()
        files[str(path.relative_to(out))] = neutral(data, out)
    return files


def neutral(data: bytes, out: Path) -> bytes:
    return re.sub(rb"(alone-\d|pair)", b"", data.replace(os.fsencode(out.parent), b""))


if __name__ == "__main__":
    typer.run(main)
