"""A batch of fine-tuning: augmented pixels and the index of each image's class."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...shared.images.fast_pixels import decode_pixels
from ...shared.randomness import generator
from ...shared.sources.records import read_bytes
from ..settings import FinetuneSettings
from .augment import Augment, kept_global_randomness
from .labelled_set import LabelledSet


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """B samples of fine-tuning."""

    index: Tensor
    """(B,) int64: the numbers of the images."""
    pixels: Tensor
    """(B, 3, S, S) uint8, augmented."""
    classes: Tensor
    """(B,) int64: the index of each image's class."""
    uniform_draws: Tensor
    """(B, depth, 2) float32 in [0, 1): decide which branches drop path drops."""

    def to(self, device: torch.device | str) -> "LabelledBatch":
        """The batch on `device`; copies do not block the host."""
        return LabelledBatch(
            self.index.to(device, non_blocking=True),
            self.pixels.to(device, non_blocking=True),
            self.classes.to(device, non_blocking=True),
            self.uniform_draws.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class LoadLabelled:
    """Loads samples (epoch, image); each one is a pure function of (seed, epoch, key)."""

    images: LabelledSet
    settings: FinetuneSettings
    depth: int
    augment: Augment

    def __call__(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The fields of a `LabelledBatch` with these samples, by name. Raises DataError for an unreadable image."""
        size, seed = self.settings.model.image_size, self.settings.train.seed
        pixels = torch.empty(len(places), 3, size, size, dtype=torch.uint8)
        draws = np.empty((len(places), self.depth, 2), dtype=np.float32)
        with kept_global_randomness():
            for place, (epoch, index) in enumerate(places):
                record = self.images.record(index)
                drawn = generator(seed, "augment", epoch, record.key)
                draws[place] = drawn.random((self.depth, 2), dtype=np.float32)
                name = f"{record.path}: image {record.key!r}"
                source = decode_pixels(read_bytes(record), name, None, record.max_pixels)
                pixels[place] = self.augment(source, epoch, record.key, drawn)
        indices = np.array([index for _, index in places], dtype=np.int64)
        return {
            "index": torch.from_numpy(indices),
            "pixels": pixels,
            "classes": torch.from_numpy(self.images.classes[indices]),
            "uniform_draws": torch.from_numpy(draws),
        }
