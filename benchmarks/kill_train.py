"""Kills pretrain or finetune again and again and compares what it ends with. One JSON line for each way to run it.

python benchmarks/kill_train.py [--command finetune] [--kills 20] [--stops 5] [--steps 300] [--processes 1]
    [--processes 2] [--seed 0]

`kills` SIGKILLs (of one torchrun worker or of everything) and `stops` SIGTERMs at random moments of runs of `steps`
steps, in turns with 1 and 2 processes (gloo) and 0, 1 and 2 loader workers; then the run goes on, and when it ends its
weights, the optimizer's state, the moving average and the keys of every step, in their order, are compared byte for
byte with those of a run that nobody disturbed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from mapet.quickstart.demo import TOWER
from mapet.quickstart.drawings import write_drawings
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.train_stage.weights.checkpoint import newest_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from warm import COLD_TORCHRUN, warm_command

IMAGES, BATCH = 96, 16
MODEL = {
    "model.name": "null",
    "model.dim": 64,
    "model.depth": 3,
    "model.heads": 4,
    "model.image_size": 64,
    "model.patch_size": 8,
}
TRAIN = {
    "train.batch_size": BATCH,
    "train.log_every": 7,
    "train.checkpoint_every": 20,
    "train.log_keys": "true",
    "train.ema": 0.99,
    "optimizer.warmup_epochs": 1,
}
SETTINGS = {"pretrain": {**MODEL, **TRAIN}, "finetune": TRAIN}
WORKERS = (0, 1, 2)
FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")


def main(
    kills: Annotated[int, typer.Option(help="SIGKILLs, spread over all ways.")] = 20,
    stops: Annotated[int, typer.Option(help="SIGTERMs, spread over all ways.")] = 5,
    command: Annotated[str, typer.Option(help="pretrain or finetune.")] = "pretrain",
    steps: Annotated[int, typer.Option(help="Of a run; a multiple of 6.")] = 300,
    processes: Annotated[list[int], typer.Option(help="Of a run; may be repeated.")] = [1, 2],  # noqa: B006
    seed: int = 0,
) -> None:
    if steps % (IMAGES // BATCH):
        raise typer.BadParameter(f"--steps {steps} must be a multiple of {IMAGES // BATCH}, the steps of an epoch.")
    os.environ["OMP_NUM_THREADS"] = "1"
    subprocess.run([*warm_command(), "--version"], check=True, stdout=subprocess.DEVNULL)  # imports
    draw = random.Random(seed)
    ways = [(count, workers) for count in processes for workers in WORKERS]
    plan = [[] for _ in ways]
    for at, number in enumerate([signal.SIGKILL] * kills + [signal.SIGTERM] * stops):
        plan[at % len(ways)].append(number)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        job = Job(root, command, steps)
        write_drawings(root / "images", IMAGES, seed=1, per_tar=32)
        build_codebook(root / "images", root / "codebook", tower=f"local-dir:{TOWER}", k=32, restarts=1, iterations=5)
        encode_shards(root / "images", root / "codebook", root / "tokens")
        if command == "finetune":
            write_drawings(root / "val", 32, seed=2, per_tar=32)
            Job(root, "pretrain", 2 * IMAGES // BATCH).run(root / "pretrained", 1, 0).wait()
        undisturbed = {}
        for (count, workers), signals in zip(ways, plan, strict=True):
            if count not in undisturbed:
                whole = root / f"whole-{count}"
                began = time.monotonic()
                job.run(whole, count, 0).wait()
                undisturbed[count] = (whole, time.monotonic() - began)
            print(json.dumps(campaign(job, count, workers, signals, *undisturbed[count], draw)), flush=True)


@dataclass(frozen=True)
class Job:
    """A command on the files in a folder."""

    root: Path
    command: str
    steps: int

    @property
    def options(self) -> list[object]:
        root = self.root
        if self.command == "pretrain":
            return ["--images", root / "images", "--tokens", root / "tokens"]
        return [root / "pretrained", "--images", root / "images", "--val", root / "val"]

    def run(self, out: Path, processes: int, workers: int) -> subprocess.Popen:
        more = {"train.epochs": self.steps * BATCH // IMAGES, "data.workers": workers}
        words = [
            word for key, value in {**SETTINGS[self.command], **more}.items() for word in ("--set", f"{key}={value}")
        ]
        return start(["train", self.command, *self.options, "--out", out, "--device", "cpu", *words], processes, out)


def start(words: list[object], processes: int, out: Path) -> subprocess.Popen:
    launch = [*COLD_TORCHRUN, "--standalone", "--nproc-per-node", str(processes), "--no-python"]
    command = [*(launch if processes > 1 else []), *warm_command()]
    with open(f"{out}.log", "a") as log:
        return subprocess.Popen(
            list(map(str, [*command, *words])),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def campaign(
    job: Job, processes: int, workers: int, signals: list[int], whole: Path, seconds: float, draw: random.Random
) -> dict:
    out = job.root / "killed"
    done, finished, different, wrong_keys = 0, 0, 0, 0
    while done < len(signals):
        process = job.run(out, processes, workers)
        try:
            process.wait(draw.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            kill(process, signals[done], draw)
            done += 1
            if done < len(signals):
                continue
            job.run(out, processes, workers).wait()
        finished += 1
        different += not same(whole, out)
        wrong_keys += order_of_keys(whole) != order_of_keys(out) or not once_an_epoch(out, job.steps)
        log = Path(f"{out}.log").read_text()
        starts = json.loads((out / "run.json").read_text())["starts"]
        shutil.rmtree(out)
        Path(f"{out}.log").unlink()
    return {
        "figure": f"kill campaign, {job.command}",
        "processes": processes,
        "workers": workers,
        "sigkill": sum(number == signal.SIGKILL for number in signals),
        "sigterm": sum(number == signal.SIGTERM for number in signals),
        "finished": finished,
        "different": different,
        "wrong_keys": wrong_keys,
        "resumed_in_last_run": sum(start["step"] > 0 for start in starts),
        "torn_checkpoints_met": log.count("is damaged"),
        "seconds_undisturbed": round(seconds, 1),
    }


def kill(process: subprocess.Popen, number: int, draw: random.Random) -> None:
    """One worker of torchrun's (torchrun then ends the others), or everything; SIGTERM as a scheduler sends it."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"warm.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    if number == signal.SIGTERM:
        os.kill(process.pid, number)
    elif workers and draw.random() < 0.5:
        os.kill(int(draw.choice(workers)), number)
    else:
        os.killpg(process.pid, number)
    process.wait()
    time.sleep(0.5)  # loader workers notice that their parent is gone


def same(one: Path, other: Path) -> bool:
    one, other = newest_checkpoint(one), newest_checkpoint(other)
    return one.name == other.name and all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


def order_of_keys(out: Path) -> dict[int, list[list[str]]]:
    """By step: the keys of each process in their order."""
    found: dict[int, list[list[str]]] = {}
    for path in sorted((out / "keys").glob("process-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["step"], []).append(line["keys"])
    return found


def once_an_epoch(out: Path, count: int) -> bool:
    found, an_epoch = order_of_keys(out), IMAGES // BATCH
    steps = {step: [key for keys in found[step] for key in keys] for step in found}
    return len(steps) == count and all(
        len({key for step in range(first, first + an_epoch) for key in steps[step]}) == IMAGES
        for first in range(1, count, an_epoch)
    )


if __name__ == "__main__":
    typer.run(main)
