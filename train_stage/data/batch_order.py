"""The order of images: which ones each step sees, as a pure function of seed and epoch.

It does not depend on the number of processes and workers.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...shared.randomness import generator
from ..settings import RunSettings
from .image_set import ImageSet

Indices = NDArray[np.int64]


def global_batches(
    images: ImageSet, settings: RunSettings, start: int, epochs: int | None = None
) -> Iterator[tuple[int, Indices]]:
    """Yields, from step `start` to the last one, (epoch, image numbers (batch_size,) int64 of the global batch).

    There are `epochs` epochs; by default `train.epochs`, as in a run that was not extended.

    Each epoch visits the images in a new order, each one at most once; a remainder smaller than a batch is dropped.
    `data.shuffle` says what is shuffled: all images, or the images within a few shards at a time, so that few files
    are read at once.
    """
    size = settings.train.batch_size
    steps = len(images) // size
    if not steps:
        return
    first, within = divmod(start, steps)
    for epoch in range(first, epochs or settings.train.epochs):
        parts = _PARTS[settings.data.shuffle](images, settings, epoch, within * size)
        for batch in _cut(parts, size, steps - within):
            yield epoch, batch
        within = 0


def shard_groups(images: ImageSet, settings: RunSettings, epoch: int) -> list[Indices]:
    """The shards of an epoch in their order, in groups whose images are shuffled together (data.shuffle=shards)."""
    order = generator(settings.train.seed, "shards", epoch).permutation(len(images.shard_ends))
    return np.split(order, range(settings.data.shuffle_shards, len(order), settings.data.shuffle_shards))


def _all_images(images: ImageSet, settings: RunSettings, epoch: int, start: int) -> Iterator[Indices]:
    """The images of an epoch from position `start` on, as one part."""
    yield generator(settings.train.seed, "epoch", epoch).permutation(len(images))[start:]


def _by_shards(images: ImageSet, settings: RunSettings, epoch: int, start: int) -> Iterator[Indices]:
    """The same, one group of shards at a time; groups before `start` are not drawn."""
    begins = np.concatenate([[0], images.shard_ends[:-1]])
    for number, group in enumerate(shard_groups(images, settings, epoch)):
        count = int((images.shard_ends[group] - begins[group]).sum())
        if start < count:
            rows = np.concatenate([np.arange(begins[shard], images.shard_ends[shard]) for shard in group])
            drawn = generator(settings.train.seed, "shard group", epoch, number).permutation(rows)
            yield images.images[drawn[start:]]
        start = max(start - count, 0)


_PARTS = {"full": _all_images, "shards": _by_shards}


def _cut(parts: Iterator[Indices], size: int, count: int) -> Iterator[Indices]:
    """The first `count` batches of the concatenated parts."""
    rest = np.empty(0, dtype=np.int64)
    for part in parts:
        rest = np.concatenate([rest, part])
        whole = min(len(rest) // size, count)
        yield from rest[: whole * size].reshape(whole, size)
        rest, count = rest[whole * size :], count - whole
