"""From images to patch features: decode in workers, crop to views, run the tower."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize, pad
from zlib_ng.zlib_ng import crc32

from ...shared.errors import DataError, MapetError
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
    device: torch.device

    def features(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (B, 3, S, S) -> float32 features (B, rows * columns, dim) on `device`, row by row."""
        ...


@dataclass(frozen=True)
class ExtractedBatch:
    """What was computed for consecutive images, from V views of each of B images."""

    records: list[ImageRecord]
    """The B images that could be read."""
    values: NDArray[Any]
    """(B, V, patches, dim) float32, the patch features, or (B, V, patches) of what `reduce` made of them."""
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
    reduce: Callable[[Tensor], Tensor] | None = None,
    ahead: int | None = None,
) -> Iterator[ExtractedBatch]:
    """Yields the patch features of one group of images after another, or what `reduce` makes of them.

    Args:
        tower: what computes the features.
        groups: images; they are drawn a little ahead, so that workers decode while the tower computes.
        policy: which views of each image are extracted.
        batch_size: views per forward pass.
        workers: processes that decode images.
        unit_length: whether features are scaled to length one.
        skip: whether unreadable images are listed in the batch instead of stopping.
        reduce: turns float32 features (n, dim) into one value each, on the tower's device: only the values (n,) are
            copied to the CPU. The features of an image that hold NaN or infinity are replaced by zeros.
        ahead: how many batches are computed before the first one is yielded; by default one on a GPU, which is never
            waited for then, and none on the CPU.

    Raises:
        DataError: an image cannot be read and `skip` is not set, or the features of an image hold NaN or infinity. The
            groups before it are yielded first.
    """
    on_gpu = tower.device.type == "cuda"
    if ahead is None:
        ahead = 1 if on_gpu else 0
    load = OneByOne(_LoadViews(policy, tower.preprocess, skip))
    requested: deque[Sequence[Request]] = deque()
    failed: list[MapetError] = []

    def remembered() -> Iterator[Sequence[Request]]:
        for group in groups:
            requested.append(group)
            yield group

    def loaded() -> Iterator[dict[str, Any]]:
        try:
            yield from batches(load, remembered(), workers, pin_memory=on_gpu)
        except MapetError as error:  # the batches before it are yielded first
            failed.append(error)

    computed: deque[_Computed] = deque()
    for batch in loaded():
        computed.append(_compute(tower, requested.popleft(), batch, batch_size, unit_length, reduce))
        if len(computed) > ahead:
            yield computed.popleft().finish()
    while computed:
        yield computed.popleft().finish()
    for error in failed:
        raise error


@dataclass(frozen=True)
class _Computed:
    """A batch whose values a GPU may still compute and copy."""

    records: Sequence[ImageRecord]
    loaded: dict[str, Any]
    values: Tensor
    """Of the images that could be read."""
    finite: Tensor
    """bool (images that could be read,): whether all of its features are finite."""
    ready: torch.cuda.Event | None
    """When `values` and `finite` are there; None if they are."""

    def finish(self) -> ExtractedBatch:
        """Waits for the values. Raises DataError for an image whose features hold NaN or infinity."""
        if self.ready is not None:
            self.ready.synchronize()
        pairs = list(zip(self.records, self.loaded["problem"], strict=True))
        whole = _readable(self.loaded).numpy()
        readable = [record for record, problem in pairs if not problem]
        _refuse_not_finite(self.finite, readable)
        return ExtractedBatch(
            records=readable,
            values=self.values.contiguous().numpy(),
            skipped=[(record.key, problem) for record, problem in pairs if problem],
            # Indexed by NumPy: PyTorch before 2.10 cannot index uint32.
            **{name: self.loaded[name].numpy()[whole] for name in ("crops", "flips", "sizes", "crc32")},
        )


def _compute(
    tower: PatchFeatures,
    requests: Sequence[Request],
    loaded: dict[str, Any],
    batch_size: int,
    unit_length: bool,
    reduce: Callable[[Tensor], Tensor] | None,
) -> _Computed:
    """Starts the computation of a loaded batch; on a GPU it goes on after the return."""
    readable, pixels = _readable(loaded), loaded["pixels"]
    # Indexing would copy them out of pinned memory.
    features = _features(tower, pixels if readable.all() else pixels[readable], batch_size)
    finite = torch.isfinite(features).flatten(1).all(1)
    if unit_length:
        features = normalize(features, dim=-1)
    if reduce is not None:
        # A search for the nearest centroid finds none for NaN, and what it returns instead must not become a token.
        whole = torch.where(finite[:, None, None, None], features, 0)
        features = reduce(whole.flatten(0, 2)).reshape(whole.shape[:3])
    values, finite = _to_host(features), _to_host(finite)
    ready = torch.cuda.current_stream(tower.device).record_event() if tower.device.type == "cuda" else None
    return _Computed([one.record for one in requests], loaded, values, finite, ready)


def _readable(loaded: dict[str, Any]) -> Tensor:
    """bool (B,): which images of a loaded batch could be read."""
    return torch.tensor([not problem for problem in loaded["problem"]])


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor on the CPU; from a GPU it is copied into pinned memory, and it is not waited for."""
    if tensor.device.type != "cuda":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _features(tower: PatchFeatures, pixels: Tensor, batch_size: int) -> Tensor:
    """uint8 (B, V, 3, S, S) -> float32 (B, V, patches, dim).

    Every forward pass has the same shape: kernels may round differently for another batch size, and an image's tokens
    must not depend on the other images of its batch.
    """
    patches = tower.grid[0] * tower.grid[1]
    if not len(pixels):
        return torch.empty(0, pixels.shape[1], patches, tower.dim, device=tower.device)
    views = pixels.to(tower.device, non_blocking=True).flatten(0, 1)  # as bytes, which are a quarter of floats
    parts = []
    for part in torch.split(views, batch_size):
        padded = pad(part, (0, 0, 0, 0, 0, 0, 0, batch_size - len(part)))
        parts.append(tower.features(padded)[: len(part)])
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return torch.unflatten(joined, 0, pixels.shape[:2])


def _refuse_not_finite(finite: Tensor, records: Sequence[ImageRecord]) -> None:
    """`finite`: bool (images,), one for each of `records`."""
    if not finite.all():
        record = records[int((~finite).nonzero()[0])]
        raise DataError(
            f"{record.path}: the tower gives features with NaN or infinity for image {record.key!r}; use --precision "
            "float32 or another --layer, or check the tower's weights."
        )
