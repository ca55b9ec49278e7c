"""Mixup and CutMix of neighbours in a batch, with parameters drawn for each step as timm's `Mixup` draws them.

timm mixes an image with the one at the mirrored place of its batch. Here it is mixed with its neighbour (0 with 1, 2
with 3, ...), so that processes and micro-batches, which divide a batch, do not change who is mixed with whom. The order
of a batch is random, so the pairs are as random as timm's.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from ...shared.randomness import generator
from ..settings import AugmentSettings


class Mix(NamedTuple):
    """What a step mixes; nothing if `share` is 1."""

    share: float = 1.0
    """The share of an image itself, in its pixels (Mixup) or its area (CutMix), and of its label."""
    box: tuple[int, int, int, int] | None = None
    """CutMix: top, bottom, left and right of the part that is the neighbour's. None for Mixup."""


def draw_mix(augment: AugmentSettings, size: int, seed: int, step: int) -> Mix:
    """What step `step` mixes, for images of `size` pixels: timm's batch mode, a pure function of (seed, step)."""
    return mix_from(augment, size, generator(seed, "mix", step)) if augment.mixes else Mix()


def mix_from(augment: AugmentSettings, size: int, drawn: np.random.Generator) -> Mix:
    """Draws as `timm.data.Mixup` does in mode "batch"; at least one of mixup and cutmix is positive."""
    if drawn.random() >= augment.mix_probability:
        return Mix()
    cut = augment.cutmix > 0 and (augment.mixup == 0 or drawn.random() < augment.mix_switch)
    alpha = augment.cutmix if cut else augment.mixup
    share = float(drawn.beta(alpha, alpha))
    if not cut or share == 1:
        return Mix(share)
    side = int(size * np.sqrt(1 - share))
    y, x = int(drawn.integers(0, size)), int(drawn.integers(0, size))
    top, left = max(y - side // 2, 0), max(x - side // 2, 0)
    bottom, right = min(y + (side + 1) // 2, size), min(x + (side + 1) // 2, size)
    return Mix(1 - (bottom - top) * (right - left) / float(size * size), (top, bottom, left, right))


def neighbours(values: Tensor) -> Tensor:
    """The values (B, ...) of each image's neighbour; B is even."""
    return values.reshape(-1, 2, *values.shape[1:]).flip(1).flatten(0, 1)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """The mixed images, float (B, 3, S, S)."""
    if mix.share == 1:
        return images
    if mix.box is None:
        return images * mix.share + neighbours(images) * (1 - mix.share)
    top, bottom, left, right = mix.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = neighbours(images[:, :, top:bottom, left:right])
    return mixed
