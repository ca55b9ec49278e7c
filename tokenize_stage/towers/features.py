"""From images to patch features: decode in workers, crop to views, run the tower."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize, pad
from zlib_ng.zlib_ng import crc32

from ...shared.errors import DataError
from ...shared.images.decode import read_image
from ...shared.images.views import Preprocess, ViewPolicy, resized, show_view, to_array
from ...shared.runtime.loader import OneByOne, batches
from ...shared.sources.keys import Skipped
from ...shared.sources.records import ImageRecord

_MOST_PIXELS = 100_000_000


class PatchFeatures(Protocol):
    """Computes patch features of views: a tower or a tokenizer."""

    preprocess: Preprocess
    grid: tuple[int, int]
    dim: int

    def features(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B, 3, S, S) -> float32 features (B, rows * columns, dim), row by row."""
        ...


@dataclass(frozen=True)
class ExtractedBatch:
    """Patch features of consecutive images, V views of each of B images."""

    records: list[ImageRecord]
    """The B images that could be read."""
    features: NDArray[np.float32]
    """(B, V, patches, dim)."""
    crops: NDArray[np.float64]
    """(B, V, 4): top, left, height, width in upright source pixels."""
    flips: NDArray[np.bool_]
    """(B, V)."""
    sizes: NDArray[np.int32]
    """(B, 2): height and width of the upright images in pixels."""
    crc32: NDArray[np.uint32]
    """(B,): of the images' encoded bytes."""
    skipped: Skipped
    """(key, reason) of the images between them that could not be read."""


@dataclass(frozen=True)
class Request:
    """An image whose views from `first_view` on are wanted."""

    record: ImageRecord
    first_view: int = 0


@dataclass(frozen=True)
class _LoadViews:
    """Decodes an image and cuts out its views; runs in a worker."""

    policy: ViewPolicy
    preprocess: Preprocess
    skip: bool

    def __call__(self, request: Request) -> dict[str, Any]:
        record, numbers = request.record, range(request.first_view, self.policy.views)
        try:
            image, data = read_image(record)
            self._refuse_long(image, record, numbers)
        except DataError as error:
            if not self.skip:
                raise
            # The folder of the file differs between machines and must not enter the store.
            problem = str(error).replace(str(record.path), record.path.name).rstrip(".")
            size = self.preprocess.image_size
            blank = np.zeros((len(numbers), 3, size, size), dtype=np.uint8)
            return self._sample(problem, blank, np.zeros((len(numbers), 4)), np.zeros(len(numbers), bool), (0, 0), 0)
        views, boxes, flips = zip(
            *(show_view(image, self.policy, record.key, view, self.preprocess) for view in numbers), strict=True
        )
        pixels = np.stack([to_array(view) for view in views])
        return self._sample("", pixels, np.array(boxes), np.array(flips), (image.height, image.width), crc32(data))

    def _refuse_long(self, image: Image.Image, record: ImageRecord, numbers: range) -> None:
        """Refuses images so long and narrow that resizing them for the centre view would take too much memory."""
        width, height = resized(self.preprocess, *image.size)
        if width * height > _MOST_PIXELS and any(map(self.policy.is_centre, numbers)):
            raise DataError(
                f"{record.path}: image {record.key!r} is {image.width}x{image.height} pixels, too long: "
                f"its centre would be cut out of {width}x{height}."
            )

    @staticmethod
    def _sample(
        problem: str,
        pixels: NDArray[np.uint8],
        crops: NDArray[np.float64],
        flips: NDArray[np.bool_],
        size: tuple[int, int],
        crc32: int,
    ) -> dict[str, Any]:
        return {
            "problem": problem,
            "pixels": pixels,
            "crops": crops,
            "flips": flips,
            "sizes": np.array(size, dtype=np.int32),
            "crc32": np.uint32(crc32),
        }


def extract(
    tower: PatchFeatures,
    records: Sequence[ImageRecord],
    policy: ViewPolicy,
    batch_size: int,
    workers: int,
    *,
    unit_length: bool,
    skip: bool = False,
) -> Iterator[ExtractedBatch]:
    """Yields the patch features of all views of `records`, in order; see `extract_groups`."""
    groups = group_requests([Request(record) for record in records], policy, batch_size)
    return extract_groups(tower, groups, policy, batch_size, workers, unit_length=unit_length, skip=skip)


def group_requests(requests: Sequence[Request], policy: ViewPolicy, batch_size: int) -> Iterator[Sequence[Request]]:
    """Splits requests for the same number of views into groups of about `batch_size` views."""
    views = policy.views - requests[0].first_view if requests else 1
    images = max(1, batch_size // views)
    for start in range(0, len(requests), images):
        yield requests[start : start + images]


def extract_groups(
    tower: PatchFeatures,
    groups: Iterable[Sequence[Request]],
    policy: ViewPolicy,
    batch_size: int,
    workers: int,
    *,
    unit_length: bool,
    skip: bool = False,
) -> Iterator[ExtractedBatch]:
    """Yields the patch features of one group of images after another.

    Args:
        tower: what computes the features.
        groups: images; they are drawn a little ahead, so that workers decode while the tower computes.
        policy: which views of each image are extracted.
        batch_size: views per forward pass.
        workers: processes that decode images.
        unit_length: whether features are scaled to length one.
        skip: whether unreadable images are listed in the batch instead of stopping.

    Raises:
        DataError: an image cannot be read and `skip` is not set, or the features of an image hold NaN or infinity.
    """
    loading: deque[Sequence[Request]] = deque()

    def remembered() -> Iterator[Sequence[Request]]:
        for group in groups:
            loading.append(group)
            yield group

    for batch in batches(OneByOne(_LoadViews(policy, tower.preprocess, skip)), remembered(), workers):
        records = [request.record for request in loading.popleft()]
        problems = batch["problem"]
        readable = torch.tensor([not problem for problem in problems])
        features = _features(tower, batch["pixels"][readable], batch_size)
        _refuse_not_finite(features, [record for record, problem in zip(records, problems, strict=True) if not problem])
        if unit_length:
            features = normalize(features, dim=-1)
        pairs = list(zip(records, problems, strict=True))
        yield ExtractedBatch(
            records=[record for record, problem in pairs if not problem],
            features=_to_numpy(features),
            skipped=[(record.key, problem) for record, problem in pairs if problem],
            # Indexed by NumPy: PyTorch before 2.10 cannot index uint32.
            **{name: _to_numpy(batch[name])[readable.numpy()] for name in ("crops", "flips", "sizes", "crc32")},
        )


def _features(tower: PatchFeatures, pixels: Tensor, batch_size: int) -> Tensor:
    """uint8 (B, V, 3, S, S) -> float32 (B, V, patches, dim).

    Every forward pass has the same shape: kernels may round differently for another batch size, and an image's tokens
    must not depend on the other images of its batch.
    """
    patches = tower.grid[0] * tower.grid[1]
    if not len(pixels):
        return torch.empty(0, pixels.shape[1], patches, tower.dim)
    views = pixels.flatten(0, 1)
    parts = []
    for part in torch.split(views, batch_size):
        padded = pad(part, (0, 0, 0, 0, 0, 0, 0, batch_size - len(part)))
        parts.append(tower.features(padded)[: len(part)])
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return torch.unflatten(joined, 0, pixels.shape[:2])


def _refuse_not_finite(features: Tensor, records: Sequence[ImageRecord]) -> None:
    """A search for the nearest centroid finds none for NaN, and what it returns instead must not become a token."""
    finite = torch.isfinite(features).flatten(1).all(1) if len(features) else torch.ones(0, dtype=torch.bool)
    if not finite.all():
        record = records[int((~finite).nonzero()[0])]
        raise DataError(
            f"{record.path}: the tower gives features with NaN or infinity for image {record.key!r}; use --precision "
            "float32 or another --layer, or check the tower's weights."
        )


def _to_numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.cpu().contiguous().numpy()
