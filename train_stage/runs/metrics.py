"""The metrics of a run: one line of metrics.jsonl every few steps, and the same numbers for TensorBoard and others.

The lines do not depend on where a run was stopped, except for speed, waiting and memory, which are measured. To add a
metric, see CONTRIBUTING.md.
"""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..training.bad_steps import BadStep
from ..training.step_metrics import StepMetrics
from .jsonl import drop_lines_after
from .metric_writers import MetricWriter

_NOT_SCALARS = ("step", "epoch")


class Logbook:
    """Averages the metrics of every `every` steps into one line."""

    def __init__(
        self,
        path: Path | None,
        start: int,
        pending: Sequence[StepMetrics],
        *,
        every: int,
        steps: int,
        steps_per_epoch: int,
        bands: str | None = None,
        measure: str = "accuracy",
        peak_images_per_second: float | None = None,
        writers: Sequence[MetricWriter] = (),
    ) -> None:
        """Opens the log of a run that starts or resumes at step `start` of `steps`.

        Args:
            path: metrics.jsonl, whose lines after `start` are dropped; None in processes that write nothing.
            pending: the metrics since the last line before the checkpoint at `start`.
            bands: the `measure` of each band is logged as `measure`_by_`bands`; None logs the mean alone.
            measure: what the mean of `StepMetrics.right` is (`task.Bands`).
            peak_images_per_second: at the peak FLOP/s of all GPUs, for MFU; None if it is unknown.
            writers: where lines are written besides `path`; they are closed with the logbook.
        """
        self._every, self._steps, self._steps_per_epoch = every, steps, steps_per_epoch
        self._bands, self._measure = bands, measure
        self._peak, self._pending, self._summary = peak_images_per_second, list(pending), ""
        self._writers = writers
        self.lines = [] if path is None else drop_lines_after(path, start)
        self._file = None if path is None else open(path, "a")  # noqa: SIM115 (closed by __exit__)
        self.images = self._images_before = 0
        self.waited = self._waited_before = 0.0
        self._since = self._began = time.monotonic()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        for writer in self._writers:
            writer.close()

    @property
    def images_per_second(self) -> float:
        """Since the logbook was opened."""
        return self.images / max(time.monotonic() - self._began, 1e-9)

    @property
    def data_wait(self) -> float:
        """Share of the time that was spent waiting for data, in [0, 1]."""
        return self.waited / max(time.monotonic() - self._began, 1e-9)

    def pending(self, step: int) -> list[dict[str, Any]]:
        """The metrics since the last line, as JSON, after `step` steps. Raises BadStep if a loss is not finite."""
        pending = [metrics.to_json() for metrics in self._pending]
        for at, metrics in enumerate(pending, step - len(pending) + 1):
            if metrics["problem"] is None and metrics["loss"] is None:
                raise BadStep(at, "a loss that is NaN or infinite")
        return pending

    def log(self, step: int, metrics: StepMetrics, waited: float) -> str:
        """Logs the metrics of one step and the seconds that it waited for data.

        Returns what to show beside the progress bar. Raises BadStep if a line is due and a loss in it is not finite,
        before anything is written.
        """
        self._pending.append(metrics)
        self.images += metrics.images
        self.waited += waited
        if step % self._every == 0 or step == self._steps:
            pending, self._pending = self.pending(step), []
            if self._file is not None:
                self._write(step, self._line(step, pending))
        return self._summary

    def log_evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the numbers of an evaluation beside the other curves."""
        for writer in self._writers:
            writer.write(step, {f"probe/{name}": value for name, value in numbers.items()})

    def _line(self, step: int, pending: list[dict[str, Any]]) -> dict[str, Any]:
        """The line of metrics.jsonl for these steps."""
        return {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            **_means(pending, self._bands, self._measure),
            **self._speed(),
            "memory_mb": peak_memory_mb(),
        }

    def _speed(self) -> dict[str, float]:
        now, images, waited = time.monotonic(), self.images - self._images_before, self.waited - self._waited_before
        seconds = max(now - self._since, 1e-9)
        self._since, self._images_before, self._waited_before = now, self.images, self.waited
        speed = {"images_per_second": round(images / seconds, 2), "data_wait": round(waited / seconds, 4)}
        return speed if self._peak is None else {**speed, "mfu": round(images / seconds / self._peak, 4)}

    def _write(self, step: int, line: dict[str, Any]) -> None:
        assert self._file is not None
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        scalars = _scalars(line)
        for writer in self._writers:
            writer.write(step, scalars)
        self._summary = _summary(line, self._measure)


def _means(pending: list[dict[str, Any]], bands: str | None, measure: str) -> dict[str, Any]:
    """Means over steps; skipped steps count in `skipped_steps` only."""
    done = [metrics for metrics in pending if metrics["problem"] is None]
    right, guesses = (
        [sum(band) for band in zip(*(metrics[name] for metrics in done), strict=True)] for name in ("right", "guesses")
    )
    by_band = [a / b if b else None for a, b in zip(right, guesses, strict=True)]
    return {
        "loss": fmean(metrics["loss"] for metrics in done) if done else None,
        measure: sum(right) / sum(guesses) if done else None,
        **({} if bands is None else {f"{measure}_by_{bands}": by_band}),
        "lr": pending[-1]["lr"],
        "gradient_norm": fmean(metrics["gradient_norm"] for metrics in done) if done else None,
        "skipped_steps": len(pending) - len(done),
    }


def _scalars(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line; those of a list are numbered NAME/0, NAME/1, ..."""
    scalars: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            scalars |= {f"{name}/{at}": entry for at, entry in enumerate(value) if entry is not None}
        elif value is not None and name not in _NOT_SCALARS:
            scalars[name] = value
    return scalars


def _summary(line: dict[str, Any], measure: str) -> str:
    speed = f"{line['images_per_second']:.0f} images/s"
    if line["loss"] is None:
        return f"all {line['skipped_steps']} steps skipped, {speed}"
    return f"loss {line['loss']:.3f}, {measure} {line[measure]:.1%}, {speed}"


def peak_memory_mb() -> int:
    """Peak memory in MiB: reserved by PyTorch on the GPU, or resident where there is none."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_reserved() >> 20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20
