"""A training batch: the pixels of stored views, the tokens of those very views, and permutations of their patches.

Images and tokens are joined by key, and an image's bytes must be those that were encoded (CRC32).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...shared.errors import DataError, UsageError
from ...shared.images.fast_pixels import decode_pixels, replay_pixels
from ...shared.images.views import CropBox, Preprocess, ViewPolicy, center_view, replay, to_array, view_of_epoch
from ...shared.randomness import generator
from ...shared.runtime.loader import batches
from ...shared.sources.records import ImageRecord
from ...shared.tokens.store import TokenStore
from ..objectives.permutations import draw_permutation
from ..settings import ModelSettings, Settings
from .color_jitter import draw_jitter
from .dataset import TokenisedImages
from .remote_tars import wait_for


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples of pre-training."""

    index: Tensor
    """(B,) int64: the numbers of the images."""
    pixels: Tensor
    """(B, 3, S, S) uint8, channels last in memory."""
    order: Tensor
    """(B, N) int64: the permutation of the patches, in raster order, visible ones first."""
    tokens: Tensor
    """(B, N) int64: the tokens in that order."""
    uniform_draws: Tensor
    """(B, depth, 2) float32 in [0, 1): decide which branches drop path drops."""
    jitter_factors: Tensor | None = None
    """(B, 3) float32: factors of brightness, contrast and saturation; None without color jitter."""
    jitter_order: Tensor | None = None
    """(B, 3) int64: the order in which they are applied."""
    teacher_pixels: Tensor | None = None
    """(B, 3, T, T) uint8: the same views as a tower sees them; None unless its features are predicted."""
    features: Tensor | None = None
    """(B, N, D) float32: the tower's features in raster order, where they are known already."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`; copies do not block the host."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items() if value is not None}
        return Batch(**moved)


def load_batches(
    load: "LoadBatch", places: Iterable[Sequence[tuple[int, int]]], workers: int, *, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yields the batch of each list of (epoch, image) in `places`, in order, loaded by `workers` processes.

    Raises the errors of `loader.batches` and of `LoadBatch`.
    """
    for tensors in batches(load, places, workers, pin_memory=pin_memory):
        yield Batch(**tensors)


def check_grid(store: TokenStore, model: ModelSettings) -> None:
    """Raises UsageError, naming sizes that would fit, unless the model has one patch per token."""
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
        f"and {store.path} has {rows}x{columns} tokens per image; these would fit: {fits}."
    )


@dataclass(frozen=True)
class TeacherViews:
    """Stored views as the tower saw them when it computed their tokens: the same crop, resize and filter."""

    policy: ViewPolicy
    preprocess: Preprocess

    def pixels(self, source: Tensor, view: int, box: CropBox, flip: bool) -> Tensor:
        """One view of an image uint8 (3, height, width): uint8 (3, T, T).

        Raises ValueError for a box outside of the image.
        """
        image, wanted = Image.fromarray(source.permute(1, 2, 0).numpy()), self.preprocess
        if self.policy.is_centre(view):
            return torch.from_numpy(to_array(center_view(image, wanted)))
        return torch.from_numpy(to_array(replay(image, box, flip, wanted.image_size, wanted.interpolation)))


@dataclass(frozen=True)
class LoadBatch:
    """Loads samples (epoch, image); each one is a pure function of (seed, epoch, key)."""

    images: TokenisedImages
    settings: Settings
    teacher: TeacherViews | None = None
    """Adds `teacher_pixels` to the batches."""

    def __call__(self, places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The fields of a `Batch` with these samples, by name."""
        records = [self.images.record(index) for _, index in places]
        # All draws come before any pixels, which would evict this code from the processor's cache.
        drawn = [self._draw(epoch, record.key) for (epoch, _), record in zip(places, records, strict=True)]
        views = np.array([view for view, _ in drawn])
        samples = [sample for _, sample in drawn]
        columns = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        indices = np.array([index for _, index in places])
        rows = self.images.rows[indices]
        tokens = self.images.tokens[rows, views].reshape(len(rows), -1)
        columns["tokens"] = np.take_along_axis(tokens, columns["order"], axis=1).astype(np.int64)
        loaded = {name: torch.from_numpy(values) for name, values in {"index": indices, **columns}.items()}
        return {**loaded, **self._pixels(records, indices, rows, views)}

    def _draw(self, epoch: int, key: str) -> tuple[int, dict[str, NDArray[np.generic]]]:
        """Which stored view a sample shows, and everything else about it that is random."""
        seed, data = self.settings.train.seed, self.settings.data
        random = generator(seed, "sample", epoch, key)
        view = view_of_epoch(self.images.views, seed, epoch, key)
        sample: dict[str, NDArray[np.generic]] = {
            "order": draw_permutation(self.settings.objective, self.images.tokens.shape[-1], random),
            "uniform_draws": random.random((self.settings.model.depth, 2), dtype=np.float32),
        }
        if data.color_jitter:
            sample["jitter_factors"], sample["jitter_order"] = draw_jitter(data.color_jitter, random)
        return view, sample

    def _pixels(
        self,
        records: Sequence[ImageRecord],
        indices: NDArray[np.int64],
        rows: NDArray[np.int64],
        views: NDArray[np.int64],
    ) -> dict[str, Tensor]:
        """`Batch.pixels` and, for a teacher, `Batch.teacher_pixels`, by name."""
        size, interpolation = self.settings.model.image_size, self.settings.data.interpolation
        boxes, flips = self.images.crops[rows, views].tolist(), self.images.flips[rows, views].tolist()
        pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)
        taught: list[Tensor] = []
        for place, (record, index) in enumerate(zip(records, indices.tolist(), strict=True)):
            content = self._read(record, index)
            name = f"{self.images.source(index)}: image {record.key!r}"
            source = decode_pixels(content, name, self.images.is_plain(index, content, name), self.images.max_pixels)
            try:
                box, flip = CropBox(*boxes[place]), flips[place]
                pixels[place] = replay_pixels(source, box, flip, size, interpolation)
                if self.teacher is not None:
                    taught.append(self.teacher.pixels(source, int(views[place]), box, flip))
            except ValueError as error:
                raise DataError(
                    f"{name}: its stored view lies outside of it ({error}); encode its shard again."
                ) from None
        return {"pixels": pixels, **({"teacher_pixels": torch.stack(taught)} if taught else {})}

    def _read(self, record: ImageRecord, index: int) -> bytes:
        """The encoded bytes of an image, once they are on this disk.

        A tar of an earlier group of shards may be deleted between its appearance and this read, if loaders are ahead of
        the window of fetched tars; it is fetched again when the window reaches it.
        """
        if not self.images.is_remote:
            return self.images.read(record, index)
        while True:
            wait_for(record.path)
            try:
                return self.images.read(record, index)
            except DataError:
                if record.path.exists():
                    raise
