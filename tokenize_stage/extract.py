"""Images on their way through a tower: decoded in workers, batched to one fixed shape, turned into patch features."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import normalize, pad

from ..shared.images import ImageRecord, read_image
from ..shared.loading import batches
from ..shared.views import Preprocess, center_view, to_array
from .towers import Tower


@dataclass(frozen=True)
class ExtractedBatch:
    """Patch features of consecutive images: `features` (B, patches, dim) float32, `sizes` (B, 2) height and width of
    the upright images in pixels, `crc32` (B,) of their encoded bytes."""

    features: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray


@dataclass(frozen=True)
class _CenterViews:
    records: Sequence[ImageRecord]
    preprocess: Preprocess

    def __call__(self, index: int) -> dict:
        image, data = read_image(self.records[index])
        return {
            "pixels": to_array(center_view(image, self.preprocess)),
            "sizes": np.array([image.height, image.width], dtype=np.int32),
            "crc32": np.uint32(zlib.crc32(data)),
        }


def extract(
    tower: Tower, records: Sequence[ImageRecord], batch_size: int, workers: int, metric: str
) -> Iterator[ExtractedBatch]:
    """Yields the centre view's patch features of `records`, in order, `batch_size` images at a time.

    With metric "cosine" features have length one. Raises DataError for an image that cannot be read.
    """
    loaded = batches(
        _CenterViews(records, tower.preprocess), _consecutive(len(records), batch_size), len(records), workers
    )
    for batch in loaded:
        count = len(batch["pixels"])
        # Every forward pass has the same shape: kernels may round differently for another batch size, and an
        # image's tokens must not depend on the company it is in.
        pixels = pad(batch["pixels"], (0, 0, 0, 0, 0, 0, 0, batch_size - count))
        features = tower.features(pixels)[:count]
        if metric == "cosine":
            features = normalize(features, dim=-1)
        yield ExtractedBatch(_to_numpy(features), _to_numpy(batch["sizes"]), _to_numpy(batch["crc32"]))


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().contiguous().numpy()


def _consecutive(count: int, batch_size: int) -> list[range]:
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
