"""A tower, a codebook and a view policy together: images in, rows of the token store out."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...shared.errors import DataError, MapetError
from ...shared.images.keys import Skipped
from ...shared.images.records import ImageRecord
from ...shared.images.sources import SourceShard
from ...shared.images.views import ViewPolicy
from ...shared.runtime.console import Advance
from ...shared.tokens.codebook import Codebook
from ...shared.tokens.rows import NO_LABEL, ShardRows, concatenate_rows, empty_rows
from ..towers.features import ExtractedBatch, Request, extract_groups, group_requests
from ..towers.tower import Tower


@dataclass(frozen=True)
class Encoder:
    """Computes the tokens of images. With `skip`, what cannot be read is listed; without, it raises a DataError."""

    book: Codebook
    tower: Tower
    policy: ViewPolicy
    skip: bool
    batch_size: int
    workers: int

    def batches(self, groups: Iterable[Sequence[Request]]) -> Iterator[tuple[ExtractedBatch, np.ndarray]]:
        """Yields (batch, tokens (B, V, H, W) uint16) of one group of images after the other."""
        metric = self.book.description["metric"]
        for batch in extract_groups(
            self.tower, groups, self.policy, self.batch_size, self.workers, metric, skip=self.skip
        ):
            tokens, _ = self.book.assign(batch.features.reshape(-1, self.tower.dim))
            yield batch, tokens.reshape(*batch.flips.shape, *self.tower.grid)

    def encode(
        self, shards: Iterable[SourceShard], stored: Callable[[str], ShardRows | None], advance: Advance
    ) -> Iterator["EncodedShard"]:
        """Yields one shard after the other; the images of the next are decoded while the tower still sees this one.
        A shard's images can be read until the next one is asked for.

        `stored(name)` gives the rows of a shard that has some of the views; only the others are computed.
        """
        opened: deque[_OpenShard] = deque()
        failed: list[MapetError] = []

        def groups() -> Iterator[Sequence[Request]]:
            for shard in shards:
                try:
                    opened.append(_OpenShard(self, shard, stored(shard.name)))
                except MapetError as error:  # the shards before it are finished first
                    failed.append(error)
                    return
                yield from group_requests(opened[-1].requests, self.policy, self.batch_size)

        try:
            for batch, tokens in self.batches(groups()):
                while not opened[0].requests or opened[0].is_whole():
                    yield from opened.popleft().finish()
                opened[0].add(batch, tokens)
                advance(len(batch.records) + len(batch.skipped))
            while opened:
                yield from opened.popleft().finish()
            for error in failed:
                raise error
        except DataError as error:
            for one in opened:
                error = one.shard.named(error)
            raise error from None
        finally:
            for one in opened:
                one.abandon()


@dataclass(frozen=True)
class EncodedShard:
    """A shard's rows in its order, where their images lie, what was skipped, and what the source was."""

    name: str
    rows: ShardRows
    images: list[ImageRecord]
    skipped: Skipped
    source: dict[str, Any]


class _OpenShard:
    """A shard between the staging of its source and the last of its batches."""

    def __init__(self, encoder: Encoder, shard: SourceShard, before: ShardRows | None):
        self._before, self._skip, self._skipped = before, encoder.skip, Skipped()
        first_view = before.flips.shape[1] if before else 0
        with ExitStack() as files:
            self.shard = files.enter_context(shard.staged())
            records = self.shard.index(self._skipped if encoder.skip else None)
            self._files = files.pop_all()
        self.requests = [Request(record, first_view) for record in records]
        self._parts = [empty_rows(encoder.policy.views - first_view, encoder.tower.grid)]
        self._images: list[ImageRecord] = []
        self._seen = 0

    def add(self, batch: ExtractedBatch, tokens: np.ndarray) -> None:
        self._parts.append(as_rows(self.shard, batch, tokens))
        self._images += batch.records
        self._skipped += batch.skipped
        self._seen += len(batch.records) + len(batch.skipped)

    def is_whole(self) -> bool:
        return self._seen == len(self.requests)

    def finish(self) -> Iterator[EncodedShard]:
        """Yields the one shard; its images can be read until the next step."""
        with self._files:
            shard, rows = self.shard, concatenate_rows(self._parts)
            rows = _add_views(shard, self._before, rows) if self._before else rows
            yield EncodedShard(shard.name, rows, self._images, self._skipped, shard.describe(self._skip))

    def abandon(self) -> None:
        self._files.close()


def as_rows(shard: SourceShard, batch: ExtractedBatch, tokens: np.ndarray) -> ShardRows:
    """A batch of images of a shard, and their tokens, as rows of the store."""
    records = batch.records
    paths = ["" if shard.is_tar else record.path.relative_to(shard.root).as_posix() for record in records]
    labels = [NO_LABEL if record.label is None else record.label for record in records]
    return ShardRows(
        keys=np.array([record.key for record in records], dtype=object),
        tokens=tokens,
        crops=batch.crops,
        flips=batch.flips,
        sizes=batch.sizes,
        labels=np.array(labels, dtype=np.int64),
        paths=np.array(paths, dtype=object),
        offsets=np.array([record.offset for record in records], dtype=np.int64),
        lengths=np.array([record.length for record in records], dtype=np.int64),
        crc32=batch.crc32,
    )


def _add_views(shard: SourceShard, before: ShardRows, new: ShardRows) -> ShardRows:
    """The rows with the new views behind the old ones; the images must still be the same."""
    if not (np.array_equal(before.keys, new.keys) and np.array_equal(before.crc32, new.crc32)):
        raise DataError(
            f"{shard.root} has other images than when its first views were encoded; restore it, or encode all views "
            "into another --out."
        )
    joined = {
        name: np.concatenate([getattr(before, name), getattr(new, name)], axis=1)
        for name in ("tokens", "crops", "flips")
    }
    return replace(new, **joined)
