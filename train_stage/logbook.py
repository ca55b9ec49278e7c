"""What a run writes down as it goes: metrics.jsonl and TensorBoard, the same whether it was stopped or not."""

import json
import time
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..shared.errors import DataError
from ..shared.files import written_whole


@dataclass(frozen=True)
class StepMetrics:
    """One step's mean loss and sum of right guesses, still on the device, so that nothing waits for them."""

    loss: Tensor | float
    correct: Tensor | float
    gradient_norm: Tensor | float
    tokens: int
    images: int
    lr: float


class Logbook:
    """One line of metrics every `every` steps, with means over them. `pending` are the metrics since the last line
    before the checkpoint at step `start`, so that lines do not depend on where a run was stopped."""

    def __init__(
        self, out: Path, start: int, pending: list[StepMetrics], *, every: int, steps: int, steps_per_epoch: int
    ):
        self._every, self._steps, self._steps_per_epoch = every, steps, steps_per_epoch
        self._path = out / "metrics.jsonl"
        self.lines = [line for line in _read_lines(self._path) if line["step"] <= start]
        # What was logged after the checkpoint is about to happen again.
        with written_whole(self._path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        self._board = SummaryWriter(out / "tensorboard", purge_step=start + 1 if start else None)
        self._pending = pending
        self._since = self._began = time.monotonic()
        self.images = self._images_before = 0
        self._note = ""

    def __enter__(self) -> "Logbook":
        self._file = open(self._path, "a")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    @property
    def images_per_second(self) -> float:
        return self.images / max(time.monotonic() - self._began, 1e-9)

    def pending(self) -> list[dict[str, float]]:
        """The metrics since the last line. Raises DataError if a loss is no number, before it is written anywhere."""
        pending = [{name: float(value) for name, value in vars(metrics).items()} for metrics in self._pending]
        if not all(isfinite(metrics["loss"]) for metrics in pending):
            raise DataError("The loss became NaN or infinite; lower optimizer.lr or set train.precision=float32.")
        return pending

    def note(self, step: int, metrics: StepMetrics) -> str:
        """Takes one step's metrics; returns what to show beside the progress bar."""
        self._pending.append(metrics)
        self.images += metrics.images
        if step % self._every == 0 or step == self._steps:
            self._write(step)
        return self._note

    def _write(self, step: int) -> None:
        pending, now = self.pending(), time.monotonic()
        tokens = sum(metrics["tokens"] for metrics in pending)
        line = {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            "loss": fmean(metrics["loss"] for metrics in pending),
            "accuracy": sum(metrics["correct"] for metrics in pending) / tokens,
            "lr": pending[-1]["lr"],
            "gradient_norm": fmean(metrics["gradient_norm"] for metrics in pending),
            "images_per_second": round((self.images - self._images_before) / (now - self._since), 2),
        }
        self._pending, self._since, self._images_before = [], now, self.images
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name in ("loss", "accuracy", "lr", "gradient_norm", "images_per_second"):
            self._board.add_scalar(name, line[name], step)
        self._note = (
            f"loss {line['loss']:.3f}, accuracy {line['accuracy']:.1%}, {line['images_per_second']:.0f} images/s"
        )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # a process that was killed may have left half a line at the end
            break
    return lines
