"""Runs of six steps: what is in their folders, whether two are equal, and how one is left in the middle."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

NAMES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def checkpoints(run: Path) -> list[Path]:
    """In the order of their steps."""
    return sorted((run / "checkpoints").glob("step-*"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    """Whether the last checkpoints of two runs have the same bytes, and the losses and evaluations are the same."""
    first, second = checkpoints(one)[-1], checkpoints(other)[-1]
    losses = [[(line["step"], line["loss"]) for line in lines(run / "metrics.jsonl")] for run in (one, other)]
    assert [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]
    evaluations = [lines(run / "probe.jsonl") if (run / "probe.jsonl").exists() else [] for run in (one, other)]
    return (
        first.name == second.name
        and all((first / name).read_bytes() == (second / name).read_bytes() for name in NAMES)
        and losses[0] == losses[1]
        and evaluations[0] == evaluations[1]
    )


def left_at_step(run: Path, copy: Path, step: int) -> None:
    """Copies a run with checkpoints at steps 2, 4 and 6 without those after `step`."""
    shutil.copytree(run, copy)
    for checkpoint in checkpoints(copy)[step // 2 :]:
        shutil.rmtree(checkpoint)


def kill_at_first_checkpoint(process: subprocess.Popen, run: Path) -> None:
    """Kills the process of a run once it has written a checkpoint."""
    deadline = time.monotonic() + 120
    while len(checkpoints(run)) < 1 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert checkpoints(run), errors
