"""Resuming: a run continues from a checkpoint only with the task, settings, data and start that it was begun with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...shared.artifacts.fields import checked
from ...shared.errors import DataError, UsageError
from ..data.image_set import ImageSet
from ..settings import ExtensionSettings, RunSettings
from ..training.extension import new_extension
from ..weights.checkpoint import newest_checkpoint, newest_whole_checkpoint
from ..weights.read import load_weights
from ..weights.schema import Extension, RunState

RESUME = ("auto", "never")
_TASK_BEFORE_TASKS = "pretraining"
"""The task of checkpoints that do not name one."""


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, and its metadata."""

    path: Path
    metadata: dict[str, Any]
    extensions: tuple[Extension, ...] = ()
    """Of the run, finished ones and one that is under way."""


def find_resume_point(
    out: Path,
    resume: str,
    task: str,
    settings: RunSettings,
    defaults: RunSettings,
    refuse_other_data: Callable[[dict[str, Any]], None],
) -> ResumePoint | None:
    """The newest whole checkpoint in `out`, or None if the run is new.

    Args:
        out: the folder of the run.
        resume: "auto", or "never", which refuses a folder that holds a run.
        task: the name of the task.
        settings: the settings of this command.
        defaults: the settings with their default values: those of a setting that did not exist when the run was begun.
        refuse_other_data: raises an error if the metadata of a checkpoint describe other data than this command's.

    Raises UsageError if `resume` forbids it, or if the task or settings differ that change what is computed, and the
    errors of `refuse_other_data`.
    """
    if resume not in RESUME:
        raise UsageError(f"--resume {resume} is unknown; choose {' or '.join(RESUME)}.")
    if resume == "never" and newest_checkpoint(out):
        raise UsageError(f"{out} already holds a run; choose another --out, or --resume auto to resume it.")
    checkpoint = newest_whole_checkpoint(out)
    if checkpoint is None:
        return None
    path, metadata = checkpoint
    state = checked(metadata, RunState, path / "state.json", "delete this checkpoint to resume from an earlier one")
    before = metadata.get("task", _TASK_BEFORE_TASKS)
    if before != task:
        raise UsageError(f"{out} holds a run of another task ({before}, not {task}); choose another --out.")
    refuse_other_data(metadata)
    changed = _differences(metadata["settings"], settings.to_json(), defaults.to_json())
    if changed:
        raise UsageError(
            f"{out} was begun with other settings ({'; '.join(changed)}); give the same ones or another --out."
        )
    return ResumePoint(path, metadata, tuple(state.extensions))


def extended(
    point: ResumePoint | None, out: Path, epochs: int | None, schedule: ExtensionSettings, settings: RunSettings
) -> ResumePoint | None:
    """The point with the extension of its run to `epochs` epochs in all; the point itself without `epochs`.

    An extension to as many epochs that is under way or finished is gone on with, so that a command can be repeated.

    Raises UsageError if there is no run in `out`, if it is not finished or not shorter, or if an extension to as many
    epochs was begun with another schedule.
    """
    if epochs is None:
        return point
    if point is None:
        raise UsageError(
            f"--extend {epochs} goes on with a finished run and {out} holds none; leave it out to begin one."
        )
    before = point.extensions
    per_epoch, step = point.metadata["images"] // settings.train.batch_size, int(point.metadata["step"])
    if before and before[-1].epochs == epochs:
        _refuse_other_schedule(out, before[-1], new_extension(epochs, per_epoch, schedule, settings, before[:-1]))
        return point
    total = before[-1].epochs if before else settings.train.epochs
    if step < total * per_epoch:
        raise UsageError(
            f"{out} has done {step} of its {total * per_epoch} steps ({total} epochs) and only a finished run is "
            "extended; finish it with the same command without --extend first."
        )
    if epochs <= total:
        raise UsageError(
            f"{out} has {total} epochs already and --extend {epochs} counts them in; give more than {total}."
        )
    return replace(point, extensions=(*before, new_extension(epochs, per_epoch, schedule, settings, before)))


def _refuse_other_schedule(out: Path, before: Extension, now: Extension) -> None:
    names = ("lr", "min_lr", "warmup_epochs")
    changed = [
        f"extension.{name} was {getattr(before, name):g} and is {getattr(now, name):g}"
        for name in names
        if getattr(before, name) != getattr(now, name)
    ]
    if changed:
        raise UsageError(
            f"{out} was extended to {before.epochs} epochs with another schedule ({'; '.join(changed)}); give the same "
            "one, or extend it to more epochs when it is finished."
        )


def refuse_other_images(point: ResumePoint, images: ImageSet) -> None:
    """Raises DataError unless `images` are those that the run was begun with."""
    before = point.metadata
    if before["keys_sha256"] != images.keys_sha256:
        raise DataError(
            f"{point.path} was trained on {before['images']} images and --images now gives {len(images)}, not the same "
            "ones; give the same images or another --out."
        )


def refuse_other_start(point: ResumePoint, init: str | Path | None) -> None:
    """Raises UsageError if `init` is given and the run was not started from it."""
    before = point.metadata["init"]
    if init is not None and (before is None or before["sha256"] != load_weights(init).sha256()):
        start = f"from {before['file']}" if before else "from fresh weights"
        raise UsageError(f"{point.path} belongs to a run that started {start}, not from {init}; choose another --out.")


# These change how a run is executed or logged, never what is computed.
_FREE_TO_CHANGE = {
    *(f"data.{name}" for name in ("workers", "cache", "cache_gb")),
    *(f"train.{name}" for name in ("log_every", "log_keys", "checkpoint_every", "keep_last", "keep_every", "wandb")),
    # How to treat a bad step may be decided once one has occurred.
    *("train.on_bad_step", "train.spike"),
}
_FREE_GROUPS = ("execution", "extension", "probe", "validation")


def _differences(before: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """Settings that differ and change what is computed; a setting unknown to the checkpoint had its default value."""
    differences = []
    for group, values in now.items():
        if group in _FREE_GROUPS:
            continue
        for name, value in values.items():
            old = before.get(group, {}).get(name, defaults[group][name])
            if old != value and f"{group}.{name}" not in _FREE_TO_CHANGE:
                differences.append(f"{group}.{name} was {old} and is {value}")
    return differences
