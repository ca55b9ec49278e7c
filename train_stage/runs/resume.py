"""Resuming: a run continues from a checkpoint only with the task, settings, data and start that it was begun with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...shared.artifacts.fields import checked
from ...shared.errors import DataError, UsageError
from ..data.image_set import ImageSet
from ..settings import RunSettings
from ..weights.checkpoint import newest_checkpoint, newest_whole_checkpoint
from ..weights.read import load_weights
from ..weights.schema import RunState

RESUME = ("auto", "never")
_TASK_BEFORE_TASKS = "pretraining"
"""The task of checkpoints that do not name one."""


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from, and its metadata."""

    path: Path
    metadata: dict[str, Any]


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
    checked(metadata, RunState, path / "state.json", "delete this checkpoint to resume from an earlier one")
    before = metadata.get("task", _TASK_BEFORE_TASKS)
    if before != task:
        raise UsageError(f"{out} holds a run of another task ({before}, not {task}); choose another --out.")
    refuse_other_data(metadata)
    changed = _differences(metadata["settings"], settings.to_json(), defaults.to_json())
    if changed:
        raise UsageError(
            f"{out} was begun with other settings ({'; '.join(changed)}); give the same ones or another --out."
        )
    return ResumePoint(path, metadata)


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
_FREE_GROUPS = ("execution", "probe", "validation")


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
