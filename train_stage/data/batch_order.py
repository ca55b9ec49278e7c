"""Which images each step sees: a pure function of the seed and the epoch, whatever the processes and workers."""

from collections.abc import Iterator

import numpy as np

from ...shared.randomness import generator
from ..settings import Settings
from .dataset import TokenisedImages


def global_batches(data: TokenisedImages, settings: Settings, start: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields, from step `start` to the last one, (epoch, images (batch_size,) int64 of that step's global batch).

    Each epoch visits the images in a new order, each one at most once; what does not fill a batch at its end is left
    for the next epoch's order. `data.shuffle` says what is shuffled: everything, or images within a few shards at a
    time, so that they are read from few files.
    """
    size = settings.train.batch_size
    steps = len(data) // size
    if not steps:
        return
    first, within = divmod(start, steps)
    for epoch in range(first, settings.train.epochs):
        parts = _PARTS[settings.data.shuffle](data, settings, epoch, within * size)
        for batch in _cut(parts, size, steps - within):
            yield epoch, batch
        within = 0


def shard_groups(data: TokenisedImages, settings: Settings, epoch: int) -> list[np.ndarray]:
    """The shards of an epoch in their order, as groups whose images are shuffled together (data.shuffle=shards)."""
    order = generator(settings.train.seed, "shards", epoch).permutation(len(data.shard_ends))
    return np.split(order, range(settings.data.shuffle_shards, len(order), settings.data.shuffle_shards))


def _everything(data: TokenisedImages, settings: Settings, epoch: int, start: int) -> Iterator[np.ndarray]:
    """An epoch's images from the place `start` on, as one part."""
    yield generator(settings.train.seed, "epoch", epoch).permutation(len(data))[start:]


def _by_shards(data: TokenisedImages, settings: Settings, epoch: int, start: int) -> Iterator[np.ndarray]:
    """The same, group of shards by group of shards; those before `start` are not drawn."""
    begins = np.concatenate([[0], data.shard_ends[:-1]])
    for number, group in enumerate(shard_groups(data, settings, epoch)):
        count = int((data.shard_ends[group] - begins[group]).sum())
        if start < count:
            rows = np.concatenate([np.arange(begins[shard], data.shard_ends[shard]) for shard in group])
            drawn = generator(settings.train.seed, "shard group", epoch, number).permutation(rows)
            yield data.images[drawn[start:]]
        start = max(start - count, 0)


_PARTS = {"full": _everything, "shards": _by_shards}


def _cut(parts: Iterator[np.ndarray], size: int, count: int) -> Iterator[np.ndarray]:
    """The first `count` batches of what the parts hold one after the other."""
    rest = np.empty(0, dtype=np.int64)
    for part in parts:
        rest = np.concatenate([rest, part])
        whole = min(len(rest) // size, count)
        yield from rest[: whole * size].reshape(whole, size)
        rest, count = rest[whole * size :], count - whole
