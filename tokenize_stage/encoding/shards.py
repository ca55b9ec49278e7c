"""Encodes shards of images: a tokenizer and a view policy turn them into rows of the token store."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...shared.artifacts.codes import Tokens, token_dtype
from ...shared.errors import DataError, MapetError
from ...shared.images.views import ViewPolicy
from ...shared.labels.columns import to_column
from ...shared.runtime.console import Advance
from ...shared.sources.keys import Skipped
from ...shared.sources.records import ImageRecord
from ...shared.sources.sources import SourceShard
from ...shared.tokens.rows import ShardRows, concatenate_rows, empty_rows
from ..tokenizers.base import Tokenizer
from ..towers.features import ExtractedBatch, Request, extract_groups, group_requests


@dataclass(frozen=True)
class Encoder:
    """Computes the tokens of images.

    With `skip`, unreadable images are listed, and labels that cannot be read; without it, the first one raises a
    DataError. `batch_size` counts views per forward pass, `workers` processes that decode images.
    """

    tokenizer: Tokenizer
    policy: ViewPolicy
    skip: bool
    batch_size: int
    workers: int

    def batches(self, groups: Iterable[Sequence[Request]]) -> Iterator[tuple[ExtractedBatch, Tokens]]:
        """Yields (batch, tokens (B, V, H, W), uint16 or uint32) of one group of images after another.

        Raises DataError for an image whose features hold NaN or infinity, or that gets a token not below K.
        """
        for batch in self._extract(groups, self.tokenizer.tokens):
            yield batch, self._checked(batch, batch.values)

    def batches_with_features(self, groups: Iterable[Sequence[Request]]) -> Iterator[tuple[ExtractedBatch, Tokens]]:
        """As `batches`, with the features (B, V, H * W, dim) float32 as the values of each batch."""
        for batch in self._extract(groups, None):
            tokens, _ = self.tokenizer.assign(batch.values.reshape(-1, self.tokenizer.dim))
            yield batch, self._checked(batch, tokens)

    def _extract(
        self, groups: Iterable[Sequence[Request]], reduce: Callable[[Tensor], Tensor] | None
    ) -> Iterator[ExtractedBatch]:
        return extract_groups(
            self.tokenizer,
            groups,
            self.policy,
            self.batch_size,
            self.workers,
            unit_length=self.tokenizer.unit_length,
            skip=self.skip,
            reduce=reduce,
        )

    def _checked(self, batch: ExtractedBatch, tokens: NDArray[np.integer[Any]]) -> Tokens:
        """The tokens (B, V, H, W) of a batch. Raises DataError for an image with a token that is not below K."""
        k = self.tokenizer.k
        tokens = tokens.reshape(*batch.flips.shape, *self.tokenizer.grid)
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < k:
            wrong = (tokens < 0) | (tokens >= k)
            record = batch.records[int(wrong.flatten().argmax()) * len(batch.records) // tokens.size]
            raise DataError(
                f"{record.path}: the tokenizer gives token {int(tokens[wrong][0])} for image {record.key!r}, and its "
                f"K is {k}; check the codebook."
            )
        return tokens.astype(token_dtype(k), copy=False)

    def encode(
        self, shards: Iterable[SourceShard], stored: Callable[[str], ShardRows | None], advance: Advance
    ) -> Iterator["EncodedShard"]:
        """Yields one encoded shard after another; workers decode the next shard while the tower finishes this one.

        The images of a shard can be read until the next shard is asked for.

        Args:
            shards: the shards to encode.
            stored: returns the rows of a shard that has some of the views already, so that only the others are
                computed; None for a shard without any.
            advance: is called with the number of images that are done.

        Raises:
            DataError: an image or a shard cannot be read; the shards before it are yielded first.
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
    """One encoded shard: its rows in the source's order, their images, what is missing, and a digest of the source."""

    name: str
    rows: ShardRows
    images: list[ImageRecord]
    skipped: Skipped
    unlabelled: Skipped
    """(key, reason) of the images whose label could not be read."""
    source: dict[str, Any]
    labels: dict[str, Any] | None
    """Where the labels come from (`Labelling.to_json`), if not from the source alone."""


class _OpenShard:
    """A shard from the moment its source is staged until its last batch is encoded."""

    def __init__(self, encoder: Encoder, shard: SourceShard, before: ShardRows | None):
        self._before, self._skip = before, encoder.skip
        self._skipped: Skipped = []
        self._unlabelled: Skipped = []
        tokenizer, first_view = encoder.tokenizer, before.flips.shape[1] if before else 0
        with ExitStack() as files:
            self.shard = files.enter_context(shard.staged())
            records = self.shard.index(*(self._skipped, self._unlabelled) if encoder.skip else ())
            self._files = files.pop_all()
        self.requests = [Request(record, first_view) for record in records]
        self._parts = [empty_rows(encoder.policy.views - first_view, tokenizer.grid, token_dtype(tokenizer.k))]
        self._images: list[ImageRecord] = []
        self._done = 0

    def add(self, batch: ExtractedBatch, tokens: Tokens) -> None:
        self._parts.append(as_rows(self.shard, batch, tokens))
        self._images += batch.records
        self._skipped += batch.skipped
        self._done += len(batch.records) + len(batch.skipped)

    def is_whole(self) -> bool:
        return self._done == len(self.requests)

    def finish(self) -> Iterator[EncodedShard]:
        """Yields the encoded shard; its images can be read until the next step of the iterator."""
        with self._files:
            shard, rows = self.shard, concatenate_rows(self._parts)
            rows = _add_views(shard, self._before, rows) if self._before else rows
            yield EncodedShard(
                name=shard.name,
                rows=rows,
                images=self._images,
                skipped=self._skipped,
                unlabelled=self._unlabelled,
                source=shard.describe(self._skip),
                labels=None if shard.labelling is None else shard.labelling.to_json(),
            )

    def abandon(self) -> None:
        self._files.close()


def as_rows(shard: SourceShard, batch: ExtractedBatch, tokens: Tokens) -> ShardRows:
    """Puts a batch of a shard's images and their tokens (B, V, H, W) into rows of the store."""
    records = batch.records
    paths = ["" if shard.is_tar else record.path.relative_to(shard.root).as_posix() for record in records]
    labels, classes = to_column([record.label for record in records])
    return ShardRows(
        keys=np.array([record.key for record in records], dtype=object),
        tokens=tokens,
        crops=batch.crops,
        flips=batch.flips,
        sizes=batch.sizes,
        labels=labels,
        paths=np.array(paths, dtype=object),
        offsets=np.array([record.offset for record in records], dtype=np.int64),
        lengths=np.array([record.length for record in records], dtype=np.int64),
        crc32=batch.crc32,
        classes=classes,
    )


def _add_views(shard: SourceShard, before: ShardRows, new: ShardRows) -> ShardRows:
    """Appends the new views to the stored ones. Raises DataError if the images changed in between."""
    if not (np.array_equal(before.keys, new.keys) and np.array_equal(before.crc32, new.crc32)):
        raise DataError(
            f"{shard.title} has other images than when its first views were encoded; restore it, or encode all views "
            "into another --out."
        )
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(before, name), getattr(new, name)], axis=1)
        for name in ("tokens", "crops", "flips")
    }
    return replace(new, **joined)
