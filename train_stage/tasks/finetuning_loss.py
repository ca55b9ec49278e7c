"""The loss of fine-tuning: Mixup or CutMix and normalisation before the model, smoothed cross-entropy behind it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from ...shared.images.normalise import Normalise
from ..classification.batch import LabelledBatch
from ..classification.mixup import Mix, draw_mix, mix_images, neighbours
from ..model.classifier import Classifier
from ..model.mapet import drop_path_scales
from ..settings import FinetuneSettings
from ..training.task import StepInputs, TaskLoss


@dataclass(frozen=True, eq=False)
class FinetuningInputs(StepInputs):
    """What a step mixes."""

    mix: Mix


class FinetuningLoss(TaskLoss):
    """Mean cross-entropy with soft targets."""

    def __init__(self, model: Classifier, settings: FinetuneSettings, device: str, precision: str) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.normalise = Normalise(settings.data.mean, settings.data.std, device)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")

    def compile_surroundings(self) -> None:
        """Nothing: what surrounds the blocks takes little time."""

    def at_step(self, step: int, steps: int) -> FinetuningInputs:
        """What step `step` mixes."""
        settings = self.settings
        return FinetuningInputs([1], draw_mix(settings.augment, settings.model.image_size, settings.train.seed, step))

    def forward(self, batch: LabelledBatch, inputs: FinetuningInputs) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and the number of right predictions (1,): in mixed images, the share of the class
        that is predicted."""
        mix = inputs.mix
        pixels = batch.pixels.to(torch.float32, memory_format=torch.contiguous_format)
        images = mix_images(self.normalise(pixels), mix)
        with self.autocast:
            logits = self.model(images, drop_path_scales(batch.uniform_draws, self.settings.model.drop_path))
        targets = [(batch.classes, mix.share)]
        if mix.share != 1:
            targets.append((neighbours(batch.classes), 1 - mix.share))
        logits = logits.float()
        loss = soft_cross_entropy(logits, targets, self.settings.augment.label_smoothing)
        predicted = logits.argmax(1)
        right = torch.stack([(predicted == classes).float().sum() * share for classes, share in targets])
        return loss, right.sum(0, keepdim=True)


def soft_cross_entropy(logits: Tensor, targets: list[tuple[Tensor, float]], smoothing: float) -> Tensor:
    """Mean cross-entropy of logits (B, classes) with a mixture of smoothed one-hot targets.

    `targets` are (classes (B,) int64, share) with shares that add up to 1; `smoothing` is spread over all classes. The
    same as timm's SoftTargetCrossEntropy with `mixup_target`.
    """
    log_probabilities = log_softmax(logits, dim=1)
    loss = -smoothing * log_probabilities.mean(1)
    for classes, share in targets:
        loss = loss - (1 - smoothing) * share * log_probabilities.gather(1, classes[:, None])[:, 0]
    return loss.mean()
