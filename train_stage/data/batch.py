"""What a training step sees: the pixels of an image's stored view, the tokens of that very view, its permutation.

Images and tokens are joined by key, and an image's bytes must be the ones that were encoded (CRC32).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...shared.errors import UsageError
from ...shared.images.fast_pixels import decode_pixels, replay_pixels
from ...shared.images.records import ImageRecord
from ...shared.images.views import CropBox, view_of_epoch
from ...shared.randomness import generator
from ...shared.tokens.store import TokenStore
from ..objectives.permutations import draw_permutation
from ..settings import ModelSettings, Settings
from .color_jitter import draw_jitter
from .dataset import TokenisedImages
from .remote_tars import wait_for


def check_grid(store: TokenStore, model: ModelSettings) -> None:
    """UsageError, saying which sizes would fit, unless the model has one patch for each token."""
    rows, columns = store.grid
    side = model.image_size // model.patch_size
    if (rows, columns) == (side, side):
        return
    if rows != columns:
        raise UsageError(f"{store.path} has a {rows}x{columns} token grid; the model needs a square one.")
    fits = f"model.image_size={rows * model.patch_size} with model.patch_size={model.patch_size}"
    if model.image_size % rows == 0:
        fits += f", or model.patch_size={model.image_size // rows} with model.image_size={model.image_size}"
    raise UsageError(
        f"The model's grid is {side}x{side} (model.image_size {model.image_size}, model.patch_size {model.patch_size}) "
        f"and {store.path} has {rows}x{columns} tokens an image; these would fit: {fits}."
    )


@dataclass(frozen=True)
class LoadBatch:
    """Loads samples (epoch, image); each one is a pure function of (seed, epoch, key)."""

    images: TokenisedImages
    settings: Settings

    def __call__(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """B samples.

        index (B,) int64; pixels uint8 (B, 3, S, S), channels last in memory; order (B, N) int64, the permutation;
        tokens (B, N) int64 in that order; uniform_draws (B, depth, 2) float32 in [0, 1); and if there is colour jitter
        jitter_factors (B, 3) float32 and jitter_order (B, 3) int64.
        """
        records = [self.images.record(index) for _, index in places]
        # For all of the batch before any pixels, which would drive this code out of the processor's cache.
        drawn = [self._draw(epoch, record.key) for (epoch, _), record in zip(places, records, strict=True)]
        indices = np.array([index for _, index in places])
        rows, views = self.images.rows[indices], np.array([sample["view"] for sample in drawn])
        batch = {name: np.stack([sample[name] for sample in drawn]) for name in drawn[0] if name != "view"}
        tokens = self.images.tokens[rows, views].reshape(len(rows), -1)
        batch["tokens"] = np.take_along_axis(tokens, batch["order"], axis=1).astype(np.int64)
        loaded = {name: torch.from_numpy(values) for name, values in {"index": indices, **batch}.items()}
        return {**loaded, "pixels": self._pixels(records, indices, rows, views)}

    def _draw(self, epoch: int, key: str) -> dict[str, np.ndarray | int]:
        """All that is random about a sample."""
        seed, data = self.settings.train.seed, self.settings.data
        random = generator(seed, "sample", epoch, key)
        sample = {
            "view": view_of_epoch(self.images.views, seed, epoch, key),
            "order": draw_permutation(self.settings.objective, self.images.tokens.shape[-1], random),
            "uniform_draws": random.random((self.settings.model.depth, 2), dtype=np.float32),
        }
        if data.color_jitter:
            sample["jitter_factors"], sample["jitter_order"] = draw_jitter(data.color_jitter, random)
        return sample

    def _pixels(self, records: list[ImageRecord], indices: np.ndarray, rows: np.ndarray, views: np.ndarray) -> Tensor:
        size, interpolation = self.settings.model.image_size, self.settings.data.interpolation
        boxes, flips = self.images.crops[rows, views].tolist(), self.images.flips[rows, views].tolist()
        pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
        for place, (record, index) in enumerate(zip(records, indices.tolist(), strict=True)):
            if self.images.is_remote:
                wait_for(record.path)
            content = self.images.read(record, index)
            name = f"{self.images.source(index)}: image {record.key!r}"
            source = decode_pixels(content, name, self.images.is_plain(index, content, name))
            pixels[place] = replay_pixels(source, CropBox(*boxes[place]), flips[place], size, interpolation)
        return pixels
