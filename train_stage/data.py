"""What a training step sees: the pixels of an image's stored view, the tokens of that very view, its permutation.

Images and tokens are joined by key, and an image's bytes must be the ones that were encoded (CRC32).
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..shared.errors import UsageError
from ..shared.images import ImageRecord
from ..shared.pixels import decode_pixels, replay_pixels
from ..shared.randomness import generator
from ..shared.token_store import TokenStore
from ..shared.views import CropBox, view_of_epoch
from .permutations import draw_permutation
from .settings import ModelSettings, Settings
from .streaming import wait_for
from .tokenised import TokenisedImages

_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)
_GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)


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
class LoadSample:
    """Loads the sample (epoch, image): a pure function of (seed, epoch, key)."""

    images: TokenisedImages
    settings: Settings

    def __call__(self, place: tuple[int, int]) -> dict[str, np.ndarray]:
        """pixels uint8 (3, S, S); order (N,) int64; tokens (N,) int64 in that order; draws (depth, 2) float32."""
        epoch, index = place
        record = self.images.record(index)
        view = view_of_epoch(self.images.views, self.settings.train.seed, epoch, record.key)
        tokens = self.images.tokens[self.images.rows[index], view]
        random = self._random("permutation", epoch, record)
        order = draw_permutation(self.settings.objective, len(tokens), random)
        return {
            "index": index,
            "pixels": self._pixels(record, index, view, epoch),
            "order": order,
            "tokens": tokens.reshape(-1)[order].astype(np.int64),
            "draws": self._random("drop path", epoch, record).random((self.settings.model.depth, 2), dtype=np.float32),
        }

    def _random(self, what: str, epoch: int, record: ImageRecord) -> np.random.Generator:
        return generator(self.settings.train.seed, what, epoch, record.key)

    def _pixels(self, record: ImageRecord, index: int, view: int, epoch: int) -> np.ndarray:
        if self.images.is_remote:
            wait_for(record.path)
        content = self.images.read(record, index)
        source = decode_pixels(content, f"{self.images.source(index)}: image {record.key!r}")
        row = self.images.rows[index]
        box, flip = CropBox(*self.images.crops[row, view].tolist()), bool(self.images.flips[row, view])
        size, data = self.settings.model.image_size, self.settings.data
        student = replay_pixels(source, box, flip, size, data.interpolation).numpy()
        if data.color_jitter:
            student = jitter(student, data.color_jitter, self._random("jitter", epoch, record))
        return student


def jitter(pixels: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation by factors from [1 - strength, 1 + strength], in random order, no hue.

    Takes and gives uint8 (3, height, width). As torchvision's adjustments, but rounded once, at the end.
    """
    factors = random.uniform(1 - strength, 1 + strength, size=3).astype(np.float32)
    image = pixels.astype(np.float32)
    for which in random.permutation(3):
        factor = factors[which]
        if which == _CONTRAST:
            towards = (1 - factor) * (_GREY @ image.mean(axis=(1, 2)))
        elif which == _SATURATION:
            towards = np.einsum("chw,c->hw", image, (1 - factor) * _GREY)
        else:
            towards = None
        image *= factor
        if towards is not None:
            image += towards
        torch.from_numpy(image).clamp_(0, 255)  # four times as fast as NumPy's
    image += 0.5
    return image.astype(np.uint8)
