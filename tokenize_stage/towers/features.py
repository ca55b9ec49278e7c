"""Images on their way through a tower: decoded in workers, cropped to their views, turned into patch features."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize, pad

from ...shared.errors import DataError
from ...shared.images.decode import read_image
from ...shared.images.keys import Skipped
from ...shared.images.records import ImageRecord, crc32
from ...shared.images.views import Preprocess, ViewPolicy, resized, show_view, to_array
from ...shared.runtime.loader import OneByOne, batches
from .tower import Tower

_MOST_PIXELS = 100_000_000


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
class Request:
    """An image of which views `first_view` and above are wanted."""

    record: ImageRecord
    first_view: int = 0


@dataclass(frozen=True)
class _LoadViews:
    policy: ViewPolicy
    preprocess: Preprocess
    skip: bool

    def __call__(self, wanted: Request) -> dict:
        record, numbers = wanted.record, range(wanted.first_view, self.policy.views)
        try:
            image, data = read_image(record)
            self._refuse_long(image, record, numbers)
        except DataError as error:
            if not self.skip:
                raise
            # Where the file lies on this machine must not enter what is stored.
            problem = str(error).replace(str(record.path), record.path.name).rstrip(".")
            size = self.preprocess.image_size
            blank = np.zeros((len(numbers), 3, size, size), dtype=np.uint8)
            return self._sample(problem, blank, np.zeros((len(numbers), 4)), np.zeros(len(numbers), bool), (0, 0), 0)
        shown, boxes, flips = zip(
            *(show_view(image, self.policy, record.key, view, self.preprocess) for view in numbers), strict=True
        )
        pixels = np.stack([to_array(view) for view in shown])
        return self._sample("", pixels, np.array(boxes), np.array(flips), (image.height, image.width), crc32(data))

    def _refuse_long(self, image: Image.Image, record: ImageRecord, numbers: range) -> None:
        """The centre view is cut out of the whole image resized, which of a line of pixels is very large."""
        width, height = resized(self.preprocess, *image.size)
        if width * height > _MOST_PIXELS and any(map(self.policy.is_centre, numbers)):
            raise DataError(
                f"{record.path}: image {record.key!r} is {image.width}x{image.height} pixels, too long: "
                f"its centre would be cut out of {width}x{height}."
            )

    @staticmethod
    def _sample(
        problem: str, pixels: np.ndarray, crops: np.ndarray, flips: np.ndarray, size: tuple[int, int], crc32: int
    ) -> dict:
        return {
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
) -> Iterator[ExtractedBatch]:
    """Yields the patch features of all views of `records`, in order; see `extract_groups`."""
    groups = group_requests([Request(record) for record in records], policy, batch_size)
    return extract_groups(tower, groups, policy, batch_size, workers, metric, skip=skip)


def group_requests(requests: Sequence[Request], policy: ViewPolicy, batch_size: int) -> Iterator[Sequence[Request]]:
    """Splits requests for equally many views so that a group has about `batch_size` views."""
    views = policy.views - requests[0].first_view if requests else 1
    images = max(1, batch_size // views)
    for start in range(0, len(requests), images):
        yield requests[start : start + images]


def extract_groups(
    tower: Tower,
    groups: Iterable[Sequence[Request]],
    policy: ViewPolicy,
    batch_size: int,
    workers: int,
    metric: str,
    *,
    skip: bool = False,
) -> Iterator[ExtractedBatch]:
    """Yields the patch features of one group of images after the other.

    `groups` is drawn from a little ahead, so that `workers` processes decode while the tower computes; the tower sees
    `batch_size` views at a time. With metric "cosine" features have length one. Raises DataError for an image that
    cannot be read, unless `skip`.
    """
    asked: deque[Sequence[Request]] = deque()

    def remembered() -> Iterator[Sequence[Request]]:
        for group in groups:
            asked.append(group)
            yield group

    for batch in batches(OneByOne(_LoadViews(policy, tower.preprocess, skip)), remembered(), workers):
        records = [wanted.record for wanted in asked.popleft()]
        problems = batch["problem"]
        sound = torch.tensor([not problem for problem in problems])
        features = _features(tower, batch["pixels"][sound], batch_size)
        if metric == "cosine":
            features = normalize(features, dim=-1)
        pairs = list(zip(records, problems, strict=True))
        yield ExtractedBatch(
            records=[record for record, problem in pairs if not problem],
            features=_to_numpy(features),
            skipped=[(record.key, problem) for record, problem in pairs if problem],
            **{name: _to_numpy(batch[name][sound]) for name in ("crops", "flips", "sizes", "crc32")},
        )


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
