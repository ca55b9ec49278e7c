"""The plan of a run, from its settings alone: steps, warm-up, and the share of a batch that each process computes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...shared.errors import UsageError
from ..settings import FinetuneSettings, RunSettings, SegmentSettings
from ..weights.schema import Extension

_SMALL_DATA: dict[type, str] = {FinetuneSettings: "finetune-small-data", SegmentSettings: "segment-small-data"}
"""A recipe with a short warm-up."""


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up and a cosine after it: of a run as it was begun, or of its last extension."""

    start: int
    """The step at which it begins."""
    steps: int
    warmup: int
    """How many of the steps warm up."""
    warmup_lr: float
    """Learning rate at the first step of the warm-up."""
    lr: float
    """Peak learning rate, at the end of the warm-up."""
    min_lr: float
    """Learning rate at the end of the cosine."""

    def lr_at(self, step: int) -> float:
        """Learning rate of a step of the run, counted from 0: that of timm's `CosineLRScheduler` with `warmup_prefix`.

        The formula is written out because importing any module of timm imports all its models and torchvision, which
        takes longer than everything else that pre-training imports.
        """
        done = step - self.start
        if done < self.warmup:
            return self.warmup_lr + done * ((self.lr - self.warmup_lr) / self.warmup)
        share = math.cos(math.pi * (done - self.warmup) / (self.steps - self.warmup))
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + share)


@dataclass(frozen=True)
class Plan:
    """How the images of a run become steps."""

    images: int
    steps_per_epoch: int
    steps: int
    """In all, with those of extensions."""
    steps_as_begun: int
    """Without those of extensions."""
    schedule: Schedule
    """Of the learning rate, in the steps that are still to be done."""
    extensions: tuple[Extension, ...]
    share: int
    """Images of a batch that each process computes."""
    parts: int
    """Equal parts in which a process computes its share, accumulating gradients."""

    @property
    def epochs(self) -> int:
        """In all, with those of extensions."""
        return self.steps // self.steps_per_epoch

    @property
    def micro_batch(self) -> int:
        """Images that a process computes at once."""
        return self.share // self.parts


def make_plan(
    settings: RunSettings,
    images: int,
    processes: int = 1,
    together: int = 1,
    extensions: Sequence[Extension] = (),
) -> Plan:
    """The plan of a run on `images` images, of which a process computes multiples of `together` at once.

    Raises UsageError for sizes that do not fit together.
    """
    train = settings.train
    steps_per_epoch = images // train.batch_size
    if not steps_per_epoch:
        raise UsageError(f"train.batch_size {train.batch_size} is larger than the {images} images.")
    if train.batch_size % processes:
        raise UsageError(f"train.batch_size {train.batch_size} is not a multiple of the {processes} processes.")
    as_begun = train.epochs * steps_per_epoch
    schedule = _extended_schedule(extensions[-1], steps_per_epoch) if extensions else _schedule(settings, as_begun)
    share = train.batch_size // processes
    largest = min(settings.execution.micro_batch or share, share)
    fitting = (parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= largest)
    parts = next((parts for parts in fitting if share // parts % together == 0), None)
    if parts is None:
        raise UsageError(
            f"train.batch_size {train.batch_size} cannot be computed in parts of at most {largest} images that are "
            f"multiples of {together}, as Mixup and CutMix need; choose another train.batch_size or "
            "execution.micro_batch, or set augment.mixup=0 and augment.cutmix=0."
        )
    steps = schedule.start + schedule.steps
    return Plan(images, steps_per_epoch, steps, as_begun, schedule, tuple(extensions), share, parts)


def _schedule(settings: RunSettings, steps: int) -> Schedule:
    optimizer, epochs = settings.optimizer, settings.train.epochs
    warmup = round(optimizer.warmup_epochs * (steps // epochs))
    if warmup >= steps:
        recipe = _SMALL_DATA.get(type(settings))
        raise UsageError(
            f"optimizer.warmup_epochs {optimizer.warmup_epochs} is not shorter than {epochs} epochs; lower it, such as "
            f"--set optimizer.warmup_epochs={epochs / 10:g}{f', or use --recipe {recipe}' if recipe else ''}."
        )
    return Schedule(0, steps, warmup, optimizer.warmup_lr, optimizer.lr, optimizer.min_lr)


def _extended_schedule(extension: Extension, steps_per_epoch: int) -> Schedule:
    start, steps = extension.step, extension.epochs * steps_per_epoch - extension.step
    warmup = round(extension.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise UsageError(
            f"extension.warmup_epochs {extension.warmup_epochs:g} is not shorter than the "
            f"{steps // steps_per_epoch} epochs that are added."
        )
    return Schedule(start, steps, warmup, extension.warmup_lr, extension.lr, extension.min_lr)
