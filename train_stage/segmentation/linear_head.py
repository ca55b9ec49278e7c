"""The linear head: batch normalisation and a 1x1 convolution on the patches of a frozen ViT (as in DINOv3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ...shared.images.normalise import Normalise
from ...shared.randomness import seeded_torch
from ...shared.runtime.loader import OneByOne, batches
from ..evaluation.embed import Execution, embed
from ..evaluation.schedule import warmup_cosine
from ..masked.crops import SCALES, RandomCrops, places
from ..masked.masked_images import MaskedImage
from ..masked.masks import IGNORED
from .patches import PatchEncoder, encode

LR, WEIGHT_DECAY = 1e-3, 1e-3
WARM_UP = 1_500 / 40_000
"""Share of the iterations in which the learning rate rises, as published (arXiv 2508.10104)."""


@dataclass(frozen=True)
class Training:
    """How a head is trained; published are 40,000 iterations of 16 images."""

    iterations: int
    batch: int
    seed: int


class LinearHead(nn.Module):
    """Features of patches to logits."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor, size: int) -> Tensor:
        """Features (B, N, dim) of a square grid to logits (B, classes, size, size), bilinear between patches."""
        grid = math.isqrt(features.shape[1])
        logits = self.conv(self.norm(features.mT.reshape(len(features), -1, grid, grid)))
        return interpolate(logits, size=(size, size), mode="bilinear", align_corners=False)


def train_head(
    encoder: PatchEncoder, crops: RandomCrops, classes: int, training: Training, execution: Execution
) -> LinearHead:
    """Trains a head on random crops; the encoder stays as it is. Raises DataError for images that cannot be read."""
    size, device = crops.preprocess.image_size, execution.device
    with seeded_torch(training.seed):
        head = LinearHead(encoder.model.embed_dim, classes)
    head = head.to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    normalise = Normalise(crops.preprocess.mean, crops.preprocess.std, device)
    drawn = places(len(crops.images), training.iterations, training.batch, training.seed)
    for step, batch in enumerate(batches(OneByOne(crops), drawn, execution.workers)):
        for group in optimizer.param_groups:
            group["lr"] = LR * lr_share(step, training.iterations)
        features = embed(encoder.model, normalise(batch["pixels"]))[1]
        truth = batch["mask"].to(device, torch.int64)
        losses = cross_entropy(head(features, size), truth, ignore_index=IGNORED, reduction="sum")
        loss = losses / (truth != IGNORED).sum().clamp(min=1)
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        optimizer.step()
        execution.advance(1)
    return head.eval()


def lr_share(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest: a linear warm-up, then a cosine to 0."""
    return warmup_cosine(step, steps, max(1, round(steps * WARM_UP)))


class LinearSegmenter:
    """A trained head on its encoder, as `sliding.measure` takes it."""

    classifier = "linear head"

    def __init__(self, encoder: PatchEncoder, head: LinearHead, size: int, training: Training):
        self._encoder, self._head, self._size = encoder, head, size
        self.features = encoder.name
        self.protocol = {"feature": encoder.feature, **_protocol(size, training)}

    def logits(self, images: Sequence[MaskedImage], windows: Tensor) -> Tensor:
        """Logits (B, classes, S, S) of windows (B, 3, S, S). Raises DataError for features that are not finite."""
        return self._head(encode(self._encoder, images, windows), self._size)  # type: ignore[no-any-return]


def _protocol(size: int, training: Training) -> dict[str, Any]:
    return {
        "classifier": "batch normalisation and a 1x1 convolution on frozen patches; logits are bilinear "
        "between patches",
        "optimizer": f"AdamW, learning rate {LR:g}, weight decay {WEIGHT_DECAY:g}, warm-up {WARM_UP:.2%} of the "
        "iterations, cosine to 0",
        "iterations": training.iterations,
        "batch": training.batch,
        "seed": training.seed,
        "training_input": f"crops of {size}x{size}, mirrored at random, of images whose shorter side is "
        f"{SCALES[0]:g} to {SCALES[1]:g} times {size}",
        "hyper_parameters": "fixed beforehand",
    }
