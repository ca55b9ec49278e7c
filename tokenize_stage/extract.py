"""Images on their way through a tower: decoded in workers, cropped to their views, turned into patch features."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..shared.errors import DataError
from ..shared.images import ImageRecord, read_image
from ..shared.loading import batches
from ..shared.sources import Skipped
from ..shared.views import Preprocess, ViewPolicy, show_view, to_array
from .towers import Tower


@dataclass(frozen=True)
class ExtractedBatch:
    """Patch features of consecutive images, V views of each of B images.

    `records` (B) are the images that could be read; `features` (B, V, patches, dim) float32; `crops` (B, V, 4) float64
    and `flips` (B, V) bool as in the token store; `sizes` (B, 2) int32, height and width of the upright images in
    pixels; `crc32` (B,) uint32 of their encoded bytes; `skipped` names those between them that could not be read.
    """

    records: list[ImageRecord]
    features: np.ndarray
    crops: np.ndarray
    flips: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray
    skipped: Skipped


@dataclass(frozen=True)
class _LoadViews:
    records: Sequence[ImageRecord]
    policy: ViewPolicy
    numbers: range
    preprocess: Preprocess
    skip: bool

    def __call__(self, index: int) -> dict:
        record, size = self.records[index], self.preprocess.image_size
        try:
            image, data = read_image(record)
        except DataError as error:
            if not self.skip:
                raise
            count = len(self.numbers)
            blank = np.zeros((count, 3, size, size), dtype=np.uint8)
            # Where the file lies on this machine must not enter what is stored.
            problem = str(error).replace(str(record.path), record.path.name)
            return self._sample(index, problem, blank, np.zeros((count, 4)), np.zeros(count, bool), (0, 0), 0)
        shown, boxes, flips = zip(
            *(show_view(image, self.policy, record.key, view, self.preprocess) for view in self.numbers), strict=True
        )
        pixels = np.stack([to_array(view) for view in shown])
        return self._sample(
            index, "", pixels, np.array(boxes), np.array(flips), (image.height, image.width), zlib.crc32(data)
        )

    @staticmethod
    def _sample(
        index: int, problem: str, pixels: np.ndarray, crops: np.ndarray, flips: np.ndarray, size: tuple, crc32: int
    ) -> dict:
        return {
            "index": index,
            "problem": problem,
            "pixels": pixels,
            "crops": crops,
            "flips": flips,
            "sizes": np.array(size, dtype=np.int32),
            "crc32": np.uint32(crc32),
        }


def extract(
    tower: Tower,
    records: Sequence[ImageRecord],
    policy: ViewPolicy,
    batch_size: int,
    workers: int,
    metric: str,
    *,
    skip: bool = False,
    first_view: int = 0,
) -> Iterator[ExtractedBatch]:
    """Yields the patch features of `records`, in order: views `first_view` and above of the policy's.

    The tower sees `batch_size` views at a time. With metric "cosine" features have length one. Raises DataError for
    an image that cannot be read, unless `skip`.
    """
    numbers = range(first_view, policy.views)
    loaded = batches(
        _LoadViews(records, policy, numbers, tower.preprocess, skip),
        _consecutive(len(records), max(1, batch_size // len(numbers))),
        len(records),
        workers,
    )
    for batch in loaded:
        sound = torch.tensor([not problem for problem in batch["problem"]])
        features = _features(tower, batch["pixels"][sound], batch_size)
        if metric == "cosine":
            features = normalize(features, dim=-1)
        places = zip(batch["index"].tolist(), batch["problem"], strict=True)
        skipped = [(records[index].key, problem) for index, problem in places if problem]
        arrays = {name: _to_numpy(batch[name][sound]) for name in ("crops", "flips", "sizes", "crc32")}
        kept = [records[index] for index in batch["index"][sound].tolist()]
        yield ExtractedBatch(kept, _to_numpy(features), skipped=skipped, **arrays)


def _features(tower: Tower, pixels: Tensor, batch_size: int) -> Tensor:
    """uint8 (B, V, 3, S, S) -> float32 (B, V, patches, dim).

    Every forward pass has the same shape: kernels may round differently for another batch size, and an image's tokens
    must not depend on the company it is in.
    """
    patches = tower.grid[0] * tower.grid[1]
    if not len(pixels):
        return torch.empty(0, pixels.shape[1], patches, tower.dim)
    views = pixels.flatten(0, 1)
    parts = []
    for part in views.split(batch_size):
        padded = pad(part, (0, 0, 0, 0, 0, 0, 0, batch_size - len(part)))
        parts.append(tower.features(padded)[: len(part)])
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.unflatten(0, pixels.shape[:2])


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().contiguous().numpy()


def _consecutive(count: int, batch_size: int) -> list[range]:
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
