"""What a run writes down as it goes: metrics.jsonl, TensorBoard and, if wanted, Weights & Biases; the same lines
whether it was stopped or not."""

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from ..training.bad_steps import BadStep
from ..training.step_metrics import StepMetrics
from .jsonl import drop_lines_after
from .metric_writers import start_wandb

_NO_SCALARS = ("step", "epoch", "accuracy_by_rank")


class Logbook:
    """One line of metrics every `every` steps, with means over them.

    `pending` are the metrics since the last line before the checkpoint at step `start`, so that lines do not depend on
    where a run was stopped. Only a logbook that `writes` (the first process's) leaves anything on disk.
    """

    def __init__(
        self,
        out: Path,
        start: int,
        pending: list[StepMetrics],
        *,
        every: int,
        steps: int,
        steps_per_epoch: int,
        peak_images_per_second: float | None = None,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
        writes: bool = True,
    ):
        self._every, self._steps, self._steps_per_epoch = every, steps, steps_per_epoch
        self._peak, self._pending, self._note = peak_images_per_second, pending, ""
        self._path, self._writes, self._wandb = out / "metrics.jsonl", writes, None
        self.lines = drop_lines_after(self._path, start) if writes else []
        self.images = self._images_before = 0
        self.waited = self._waited_before = 0.0
        self._board = SummaryWriter(out / "tensorboard", purge_step=start + 1 if start else None) if writes else None
        if writes and wandb is not None:
            self._wandb = start_wandb(wandb, out, settings or {})
        self._since = self._began = time.monotonic()

    def __enter__(self) -> "Logbook":
        self._file = open(self._path, "a") if self._writes else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    @property
    def images_per_second(self) -> float:
        return self.images / max(time.monotonic() - self._began, 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of the time that was spent waiting for images."""
        return self.waited / max(time.monotonic() - self._began, 1e-9)

    def pending(self, step: int) -> list[dict[str, Any]]:
        """The metrics since the last line, as JSON, after `step` steps. Raises BadStep if a loss is no number."""
        pending = [metrics.to_json() for metrics in self._pending]
        for at, metrics in enumerate(pending, step - len(pending) + 1):
            if metrics["problem"] is None and metrics["loss"] is None:
                raise BadStep(at, "a loss that is NaN or infinite")
        return pending

    def note(self, step: int, metrics: StepMetrics, waited: float) -> str:
        """Takes one step's metrics and the seconds it waited for data; returns what to show beside the progress bar.

        Raises BadStep if a line is due and a loss in it is no number, before it is written anywhere.
        """
        self._pending.append(metrics)
        self.images += metrics.images
        self.waited += waited
        if step % self._every == 0 or step == self._steps:
            self._write(step)
        return self._note

    def probed(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Shows what a probe found beside the other curves."""
        for name, value in accuracies.items():
            if self._board is not None:
                self._board.add_scalar(f"probe/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"probe/{name}": value for name, value in accuracies.items()}, step=step)

    def _write(self, step: int) -> None:
        pending, self._pending = self.pending(step), []
        if not self._writes:
            return
        line = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            **_means(pending),
            **self._speed(),
            "memory_mb": peak_memory_mb(),
        }
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        scalars = {name: value for name, value in line.items() if name not in _NO_SCALARS and value is not None}
        bands = enumerate(line["accuracy_by_rank"])
        scalars |= {f"accuracy_by_rank/{band}": value for band, value in bands if value is not None}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
        self._note = _note(line)

    def _speed(self) -> dict[str, float]:
        now, images, waited = time.monotonic(), self.images - self._images_before, self.waited - self._waited_before
        seconds = max(now - self._since, 1e-9)
        self._since, self._images_before, self._waited_before = now, self.images, self.waited
        speed = {"images_per_second": round(images / seconds, 2), "data_wait": round(waited / seconds, 4)}
        return speed if self._peak is None else {**speed, "mfu": round(images / seconds / self._peak, 4)}


def _means(pending: list[dict[str, Any]]) -> dict[str, Any]:
    """What a line says of its steps; those that were skipped count in `skipped_steps` only."""
    done = [metrics for metrics in pending if metrics["problem"] is None]
    right, guesses = (
        [sum(band) for band in zip(*(m[name] for m in done), strict=True)] for name in ("right", "guesses")
    )
    return {
        "loss": fmean(metrics["loss"] for metrics in done) if done else None,
        "accuracy": sum(right) / sum(guesses) if done else None,
        "accuracy_by_rank": [a / b if b else None for a, b in zip(right, guesses, strict=True)],
        "lr": pending[-1]["lr"],
        "gradient_norm": fmean(metrics["gradient_norm"] for metrics in done) if done else None,
        "skipped_steps": len(pending) - len(done),
    }


def _note(line: dict[str, Any]) -> str:
    speed = f"{line['images_per_second']:.0f} images/s"
    if line["loss"] is None:
        return f"all {line['skipped_steps']} steps skipped, {speed}"
    return f"loss {line['loss']:.3f}, accuracy {line['accuracy']:.1%}, {speed}"


def peak_memory_mb() -> int:
    """MiB: the most that PyTorch held on the GPU, or that was resident where there is none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() >> 20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20
