"""A batch of segmentation: crops of images and of their masks, and what is random about them."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...shared.images.views import Preprocess
from ...shared.randomness import generator
from ..data.color_jitter import draw_jitter
from ..settings import SegmentSettings
from .crops import random_crop
from .masked_set import MaskedSet


@dataclass(frozen=True, eq=False)
class MaskedBatch:
    """B samples of segmentation."""

    index: Tensor
    """(B,) int64: the numbers of the images."""
    pixels: Tensor
    """(B, 3, S, S) uint8."""
    mask: Tensor
    """(B, S, S) int16: the class of each pixel, or `IGNORED`."""
    uniform_draws: Tensor
    """(B, depth, 2) float32 in [0, 1): decide which branches drop path drops."""
    channel_draws: Tensor
    """(B, channels) float32 in [0, 1): decide which channels dropout drops, of the head and of the auxiliary head."""
    jitter_factors: Tensor
    """(B, 3) float32: factors of brightness, contrast and saturation."""
    jitter_order: Tensor
    """(B, 3) int64: the order in which they are applied."""

    def to(self, device: torch.device | str) -> "MaskedBatch":
        """The batch on `device`; copies do not block the host."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return MaskedBatch(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class LoadMasked:
    """Loads a sample (epoch, image), which is a pure function of (seed, epoch, key)."""

    images: MaskedSet
    settings: SegmentSettings
    preprocess: Preprocess
    depth: int
    channels: int
    """Channels that dropout draws for."""

    def __call__(self, place: tuple[int, int]) -> dict[str, Any]:
        """The fields of a `MaskedBatch`, of one sample. Raises DataError for an unreadable image or mask."""
        (epoch, index), augment = place, self.settings.augment
        pair = self.images.pair(index)
        random = generator(self.settings.train.seed, "segment", epoch, pair.image.key)
        factors, order = draw_jitter(self.settings.data.color_jitter, random)
        low, high = augment.scale
        pixels, mask = random_crop(pair, self.images.rule, self.preprocess, random, (low, high), augment.flip)
        return {
            "index": index,
            "pixels": pixels,
            "mask": mask,
            "uniform_draws": random.random((self.depth, 2), dtype=np.float32),
            "channel_draws": random.random(self.channels, dtype=np.float32),
            "jitter_factors": factors,
            "jitter_order": order,
        }
