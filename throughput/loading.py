"""The decoder beside bare libraries, and the training loader beside bare decoding with the same workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg
from torch import Tensor
from torch.nn.functional import interpolate

from ..shared.images.fast_pixels import decode_pixels
from ..shared.runtime.loader import batches
from ..shared.sources.records import read_bytes
from ..train_stage.data.batch import LoadBatch
from ..train_stage.data.dataset import TokenisedImages
from ..train_stage.settings import Settings
from .rates import cycled, steady

Place = tuple[int, int]
"""Epoch and image number."""
Load = Callable[[Sequence[Place]], dict[str, Tensor]]
_BATCHES = 2


def bare_decode(content: bytes, plain: bool) -> Tensor:
    """uint8 (3, height, width) by the library that decodes such bytes, simplejpeg or Pillow, and nothing else."""
    pixels = decode_jpeg(content, "RGB") if plain else np.array(Image.open(BytesIO(content)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


class Decoding:
    """All images decoded one after another by one process, from bytes in memory."""

    def __init__(self, images: TokenisedImages) -> None:
        self._contents = []
        for index in range(len(images)):
            name = images.key(index)
            content = read_bytes(images.record(index))
            self._contents.append((content, name, images.is_plain(index, content, name)))

    def ours(self) -> None:
        """As the loader decodes from the second epoch on, when it is known which images are plain JPEGs."""
        for content, name, plain in self._contents:
            decode_pixels(content, name, plain)

    def bare(self) -> None:
        """By `bare_decode`."""
        for content, _, plain in self._contents:
            bare_decode(content, plain)


@dataclass(frozen=True)
class BareLoad:
    """Loads the pixels of samples by reading, decoding, cropping and resizing them, and drops them."""

    images: TokenisedImages
    size: int

    def __call__(self, places: Sequence[Place]) -> dict[str, Tensor]:
        for _, index in places:
            content = read_bytes(self.images.record(index))
            pixels = bare_decode(content, self.images.is_plain(index, content, self.images.key(index)))
            top, left, height, width = map(round, self.images.crops[self.images.rows[index], 0].tolist())
            region = pixels[None, :, top : top + height, left : left + width]
            region = region.contiguous(memory_format=torch.channels_last)
            interpolate(region, (self.size, self.size), mode="bicubic", antialias=True)
        return {"index": torch.tensor([index for _, index in places])}


@dataclass(frozen=True)
class Loading:
    """The same batches by the training loader and by `BareLoad`, with as many workers."""

    images: TokenisedImages
    settings: Settings
    workers: int

    def ours(self) -> tuple[float, float]:
        """Images, and the seconds that the training loader takes for them."""
        return self._run(LoadBatch(self.images, self.settings))

    def bare(self) -> tuple[float, float]:
        """The same for `BareLoad`."""
        return self._run(BareLoad(self.images, self.settings.model.image_size))

    def _run(self, load: Load) -> tuple[float, float]:
        count = self.workers + _BATCHES * max(self.workers, 1)
        epochs = range(1 + count * self.settings.train.batch_size // len(self.images))
        places = [(epoch, index) for epoch in epochs for index in range(len(self.images))]
        order = cycled(places, self.settings.train.batch_size, count)
        return steady(batches(load, order, self.workers), self.workers, lambda batch: len(batch["index"]))
