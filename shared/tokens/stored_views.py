"""The pixels of a token store's views, if the images are available."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError
from ..images.decode import decode
from ..images.views import CropBox, replay
from ..randomness import generator
from ..sources.records import ImageRecord, read_encoded
from ..sources.sources import Images, SourceShard, open_source, shown_images
from ..storage.remote import is_remote
from .rows import ShardRows
from .store import TokenStore


@dataclass(frozen=True, order=True)
class Place:
    """One view of one image in the store."""

    shard: str
    row: int
    view: int


class StoredViews:
    """The pixels of a store's views, from the source of its images or from the store if it contains them."""

    def __init__(self, store: TokenStore, images: Images | None):
        """Opens the source `images`, as `sources.sources.open_source` does.

        Raises DataError or UsageError if it cannot be opened, has no shard of the store or is remote.
        """
        self._store = store
        self._sources = _open_sources(store, images) if images else {}
        images_in_store = store.holds_images and not is_remote(store.path)
        self.shards: list[str] = list(self._sources) or (list(store.entries) if images_in_store else [])
        """The names of the shards whose images are available."""

    def record(self, shard: str, rows: ShardRows, row: int) -> ImageRecord:
        """Where the image of one row is."""
        root = Path(str(self._sources[shard].root if self._sources else self._store.tar_of(shard)))
        path = root / rows.paths[row] if self._sources and rows.paths[row] else root
        offset, length = int(rows.offsets[row]), int(rows.lengths[row])
        max_pixels = self._store.source_options.max_pixels
        return ImageRecord(rows.keys[row], path, offset, length, rows.label(row), max_pixels=max_pixels)

    def view(
        self, shard: str, rows: ShardRows, row: int, view: int, side: int, interpolation: str = "bicubic"
    ) -> Image.Image:
        """One stored view of an image, replayed at `side` x `side` pixels.

        Raises DataError if the image cannot be read or its bytes are not those that were encoded.
        """
        record = self.record(shard, rows, row)
        content = read_encoded(record, rows.crc32[row])
        image = decode(content, f"{record.path}: image {record.key!r}", record.max_pixels)
        try:
            return replay(image, CropBox(*rows.crops[row, view]), bool(rows.flips[row, view]), side, interpolation)
        except ValueError as error:
            raise DataError(
                f"{self._store.path}: view {view} of image {record.key!r} lies outside of the image ({error}); encode "
                "its shard again."
            ) from None


def _open_sources(store: TokenStore, images: Images) -> dict[str, SourceShard]:
    sources = {shard.name: shard for shard in open_source(images, store.source_options) if _is_of(store, shard)}
    if not sources:
        raise DataError(
            f"--images {shown_images(images)} has none of the shards of {store.path}; give the images of its tokens."
        )
    remote = next((shard.title for shard in sources.values() if shard.is_remote), None)
    if remote:
        raise DataError(f"{remote} is remote; a page needs its images here, download some of the tars first.")
    return sources


def _is_of(store: TokenStore, shard: SourceShard) -> bool:
    """Whether the store's offsets may be those of a shard; a tar inside another one has offsets of its own."""
    return shard.name in store.entries and store.entries[shard.name]["source"]["kind"] == shard.kind


def choose_images(store: TokenStore, shards: Sequence[str], count: int, seed: int) -> list[Place]:
    """Draws `count` images of `shards` uniformly, and one view of each, by `seed`; in the store's order."""
    sizes = [store.entries[name]["images"] for name in shards]
    random = generator(seed, "page images")
    images = np.sort(random.choice(sum(sizes), min(count, sum(sizes)), replace=False))
    views = random.integers(0, store.views, len(images))
    ends = np.cumsum(sizes)
    shard_numbers = np.searchsorted(ends, images, side="right")
    return [
        Place(shards[shard], int(image - (ends[shard] - sizes[shard])), int(view))
        for shard, image, view in zip(shard_numbers, images, views, strict=True)
    ]


def by_shard(store: TokenStore, images: Iterable[tuple[str, int]]) -> Iterator[tuple[str, ShardRows, list[int]]]:
    """(shard, its rows, row numbers) of the given (shard, row) pairs; each shard is read once."""
    grouped: dict[str, list[int]] = defaultdict(list)
    for shard, row in sorted(set(images)):
        grouped[shard].append(row)
    for shard, row_numbers in grouped.items():
        yield shard, store.read_rows(shard), row_numbers
