"""What a run amounts to, from its settings alone: steps, warm-up, each process's share of a batch, FLOPs."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...shared.errors import UsageError
from ...shared.runtime.compat import fake_tensors
from ..model.mapet import MaPeT
from ..model.shape import Shape
from ..objectives.layouts import step_layout
from ..objectives.token_loss import token_loss
from ..settings import Settings


@dataclass(frozen=True)
class Plan:
    """How a run's images become steps."""

    images: int
    steps_per_epoch: int
    steps: int
    warmup: int
    """Steps of warm-up."""
    share: int
    """Images of a batch that each process computes."""
    parts: int
    """In how many equal parts it does."""

    @property
    def micro_batch(self) -> int:
        """Images that a process computes at once."""
        return self.share // self.parts


def make_plan(settings: Settings, images: int, processes: int = 1) -> Plan:
    """The plan of a run on `images` images. Raises UsageError for sizes that cannot be."""
    train, optimizer = settings.train, settings.optimizer
    steps_per_epoch = images // train.batch_size
    if not steps_per_epoch:
        raise UsageError(f"train.batch_size {train.batch_size} is larger than the {images} images.")
    if train.batch_size % processes:
        raise UsageError(f"train.batch_size {train.batch_size} is no multiple of the {processes} processes.")
    steps = train.epochs * steps_per_epoch
    warmup = round(optimizer.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise UsageError(
            f"optimizer.warmup_epochs {optimizer.warmup_epochs} is not shorter than {train.epochs} epochs."
        )
    share = train.batch_size // processes
    largest = min(settings.execution.micro_batch or share, share)
    parts = next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= largest)
    return Plan(images, steps_per_epoch, steps, warmup, share, parts)


def flops_per_image(settings: Settings, k: int) -> int:
    """Floating-point operations of forward and backward for one image, as `torch.utils.flop_counter` counts them.

    What gradient checkpointing computes again does not count.
    """
    shape = settings.model.shape(k)
    layout = step_layout(settings.objective, shape.patches, settings.train.seed, 0, 1, "cpu")
    with torch.device("meta"):
        model = MaPeT(shape)
    with fake_tensors(), FlopCounterMode(display=False) as counter:  # nothing is computed
        model.to_empty(device="cpu")
        images = torch.empty(1, 3, shape.image_size, shape.image_size)
        order = torch.empty(1, shape.patches, dtype=torch.int64)
        targets = torch.empty(1, len(layout.ranks), dtype=torch.int64)
        token_loss(model.predict_rows(images, order, layout), model.decoder, targets)[0].backward()
    return counter.get_total_flops()


def parameters_of(shape: Shape) -> int:
    """How many parameters the pre-training model has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MaPeT(shape).parameters())
