"""Extending a finished run: epochs are added, with a warm-up and a cosine of their own.

AdamW's moments are kept. By default the learning rate rises to the run's own peak again and falls to its own end, as
in continual pre-training by re-warming and re-decaying (arXiv 2403.08763).
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from ..settings import ExtensionSettings, RunSettings
from ..weights.schema import Extension

_LONGEST_WARMUP, _SHARE_OF_WARMUP = 1.0, 0.1


def new_extension(
    epochs: int,
    steps_per_epoch: int,
    schedule: ExtensionSettings,
    settings: RunSettings,
    before: Sequence[Extension],
) -> Extension:
    """The extension, to `epochs` epochs in all, of a run that was begun with `settings` and extended by `before`."""
    optimizer = settings.optimizer
    done = before[-1].epochs if before else settings.train.epochs
    warmup = schedule.warmup_epochs
    return Extension(
        step=done * steps_per_epoch,
        epochs=epochs,
        warmup_lr=before[-1].min_lr if before else optimizer.min_lr,
        lr=optimizer.lr if schedule.lr is None else schedule.lr,
        min_lr=optimizer.min_lr if schedule.min_lr is None else schedule.min_lr,
        warmup_epochs=min(_SHARE_OF_WARMUP * (epochs - done), _LONGEST_WARMUP) if warmup is None else warmup,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version("mapet"),
    )


def describe_extension(extension: Extension) -> str:
    """Where an extension begins and ends, its schedule, and when and by which version it was begun."""
    return (
        f"to {extension.epochs:,} epochs, from step {extension.step:,}: learning rate from {extension.warmup_lr:g} to "
        f"{extension.lr:g} in {extension.warmup_epochs:g} epochs, then a cosine to {extension.min_lr:g} "
        f"(begun {extension.time}, mapet {extension.version})"
    )
