"""The linear head: batch normalisation and a 1x1 convolution on the patches of a frozen ViT (as in DINOv3)."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from ...shared.images.normalise import Normalise
from ...shared.randomness import seeded_torch
from ...shared.runtime.loader import OneByOne, batches
from ..evaluation.embed import Execution, embed
from ..evaluation.schedule import warmup_cosine
from .crops import SCALES, RandomCrops, WholeImages, places
from .masked_images import MaskedImage
from .masks import IGNORED
from .patches import PatchEncoder, encode
from .scores import Confusion, Measured

LR, WEIGHT_DECAY = 1e-3, 1e-3
WARM_UP = 1_500 / 40_000
"""Share of the iterations in which the learning rate rises, as published (arXiv 2508.10104)."""
STRIDE = 341 / 512
"""Distance of the sliding windows as a share of their side, as published."""
_CLASSES_AT_ONCE = 16


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


@torch.no_grad()
def measure_heads(
    heads: Sequence[tuple[PatchEncoder, LinearHead]],
    whole: WholeImages,
    classes: int,
    training: Training,
    shown: Collection[str],
    execution: Execution,
) -> list[Measured]:
    """Measures heads on images of their own aspect ratio, by sliding windows, at the size of their masks; `shown` are
    keys whose predictions are kept.

    Raises DataError for an image or a mask that cannot be read.
    """
    preprocess, device = whole.preprocess, execution.device
    normalise = Normalise(preprocess.mean, preprocess.std, device)
    confusions = [Confusion(classes) for _ in heads]
    maps: list[dict[str, NDArray[np.int16]]] = [{} for _ in heads]
    indices = [[index] for index in range(len(whole.images))]
    for pair, one in zip(whole.images, batches(OneByOne(whole), indices, execution.workers), strict=True):
        pixels, truth = normalise(one["pixels"]), one["mask"][0]
        for (encoder, head), confusion, of_head in zip(heads, confusions, maps, strict=True):
            logits = _window_logits(encoder, head, pair, pixels, preprocess.image_size, execution.batch_size)
            predicted = argmax_resized(logits, truth.shape[0], truth.shape[1]).cpu()
            confusion.add(truth, predicted)
            if pair.image.key in shown:
                of_head[pair.image.key] = predicted.numpy().astype(np.int16)
        execution.advance(1)
    protocol = {**_protocol(preprocess.image_size, training, len(whole.images)), "preprocess": preprocess.to_json()}
    return [
        Measured(encoder.name, "linear head", {"feature": encoder.feature, **protocol}, confusion.scores(), of_head)
        for (encoder, _), confusion, of_head in zip(heads, confusions, maps, strict=True)
    ]


def windows(height: int, width: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields top and left of the windows of `size` x `size` that cover an image; the last ones end at its edges."""
    stride = max(1, int(size * STRIDE))
    for top in range(0, max(height - size + stride - 1, 0) // stride * stride + 1, stride):
        for left in range(0, max(width - size + stride - 1, 0) // stride * stride + 1, stride):
            yield min(top, height - size), min(left, width - size)


def _window_logits(
    encoder: PatchEncoder, head: LinearHead, pair: MaskedImage, pixels: Tensor, size: int, batch: int
) -> Tensor:
    """Logits (classes, height, width), means over the windows that a pixel is in; pixels (1, 3, height, width)."""
    height, width = pixels.shape[-2:]
    corners = list(windows(height, width, size))
    total: Tensor | None = None
    count = pixels.new_zeros(height, width)
    for start in range(0, len(corners), batch):
        part = corners[start : start + batch]
        crops = torch.cat([pixels[..., top : top + size, left : left + size] for top, left in part])
        logits = head(encode(encoder, [pair] * len(part), crops), size)
        total = pixels.new_zeros(logits.shape[1], height, width) if total is None else total
        for (top, left), of_window in zip(part, logits, strict=True):
            total[:, top : top + size, left : left + size] += of_window
            count[top : top + size, left : left + size] += 1
    assert total is not None
    return total / count


def argmax_resized(logits: Tensor, height: int, width: int) -> Tensor:
    """The class with the highest logit of (classes, h, w), resized to (height, width) int64, a few classes at a time:
    all of them together take gigabytes for a photograph and 150 classes."""
    best: Tensor | None = None
    found: Tensor | None = None
    for start in range(0, len(logits), _CLASSES_AT_ONCE):
        part = logits[None, start : start + _CLASSES_AT_ONCE]
        resized = interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[0]
        values, classes = resized.max(0)
        if best is None or found is None:
            best, found = values, classes
            continue
        found = torch.where(values > best, classes + start, found)
        best = torch.maximum(values, best)
    assert found is not None
    return found


def _protocol(size: int, training: Training, images: int) -> dict[str, Any]:
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
        "test_input": f"shorter side {size}; windows of {size}x{size} with stride {max(1, int(size * STRIDE))}, logits "
        "averaged and resized to the mask; measured at the mask's size",
        "hyper_parameters": "fixed beforehand",
        "val_images": images,
    }
