"""The loss of fine-tuned segmentation: color jitter and normalisation before the model, pixel-wise cross-entropy."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...shared.images.normalise import Normalise
from ..data.color_jitter import jitter
from ..masked.batch import MaskedBatch
from ..masked.masks import IGNORED
from ..model.mapet import drop_path_scales
from ..model.upernet import UPerNet, resize
from ..settings import SegmentSettings
from ..training.task import StepInputs, TaskLoss


class SegmentingLoss(TaskLoss):
    """Cross-entropy of the head, plus that of the auxiliary head with its weight."""

    def __init__(self, model: UPerNet, settings: SegmentSettings, device: str, precision: str) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.normalise = Normalise(settings.data.mean, settings.data.std, device)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")

    def compile_surroundings(self) -> None:
        """Nothing: convolutions are the libraries' own already."""

    def at_step(self, step: int, steps: int) -> StepInputs:
        """One prediction per image, whose right share is counted; nothing is drawn for a whole step."""
        return StepInputs([1])

    def forward(self, batch: MaskedBatch, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and the sum (1,) over its images of the share of labelled pixels that are right."""
        model, data = self.settings.model, self.settings.data
        pixels = batch.pixels.to(torch.float32, memory_format=torch.contiguous_format)
        if data.color_jitter:
            pixels = jitter(pixels, batch.jitter_factors, batch.jitter_order)
        dropout = (batch.channel_draws >= model.dropout).to(torch.float32) / (1 - model.dropout)
        with self.autocast:
            logits, auxiliary = self.model(
                self.normalise(pixels), drop_path_scales(batch.uniform_draws, model.drop_path), dropout
            )
        truth = batch.mask.long()
        size = (truth.shape[1], truth.shape[2])
        logits, auxiliary = resize(logits.float(), size), resize(auxiliary.float(), size)
        loss = pixel_cross_entropy(logits, truth) + model.auxiliary_weight * pixel_cross_entropy(auxiliary, truth)
        return loss, right_shares(logits, truth).sum(0, keepdim=True)


def pixel_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of logits (B, classes, S, S) with classes (B, S, S) int64, summed over the labelled pixels and
    divided by the number of all pixels.

    This is the mean of MMSegmentation, with which BEiT v2 trains; equal parts of a batch have the mean of the batch,
    whatever they ignore.
    """
    return cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum") / truth.numel()


def right_shares(logits: Tensor, truth: Tensor) -> Tensor:
    """(B,) float32: of each image, the share of the labelled pixels that are right; 0 where none is labelled."""
    right = (logits.argmax(1) == truth).flatten(1).sum(1)
    return right / (truth != IGNORED).flatten(1).sum(1).clamp(min=1)
