"""The plan of a run, from its settings alone: steps, warm-up, and the share of a batch that each process computes."""

from dataclasses import dataclass

from ...shared.errors import UsageError
from ..settings import FinetuneSettings, RunSettings


@dataclass(frozen=True)
class Plan:
    """How the images of a run become steps."""

    images: int
    steps_per_epoch: int
    steps: int
    warmup: int
    """Warm-up steps."""
    share: int
    """Images of a batch that each process computes."""
    parts: int
    """Equal parts in which a process computes its share, accumulating gradients."""

    @property
    def micro_batch(self) -> int:
        """Images that a process computes at once."""
        return self.share // self.parts


def make_plan(settings: RunSettings, images: int, processes: int = 1, together: int = 1) -> Plan:
    """The plan of a run on `images` images, of which a process computes multiples of `together` at once.

    Raises UsageError for sizes that do not fit together.
    """
    train, optimizer = settings.train, settings.optimizer
    steps_per_epoch = images // train.batch_size
    if not steps_per_epoch:
        raise UsageError(f"train.batch_size {train.batch_size} is larger than the {images} images.")
    if train.batch_size % processes:
        raise UsageError(f"train.batch_size {train.batch_size} is not a multiple of the {processes} processes.")
    steps = train.epochs * steps_per_epoch
    warmup = round(optimizer.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        recipe = ", or use --recipe finetune-small-data" if isinstance(settings, FinetuneSettings) else ""
        raise UsageError(
            f"optimizer.warmup_epochs {optimizer.warmup_epochs} is not shorter than {train.epochs} epochs; lower it, "
            f"such as --set optimizer.warmup_epochs={train.epochs / 10:g}{recipe}."
        )
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
    return Plan(images, steps_per_epoch, steps, warmup, share, parts)
