"""A tower, a codebook and a view policy together: images in, rows of the token store out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..shared.codebook import TOKEN_FIELDS, Codebook
from ..shared.console import Advance
from ..shared.errors import DataError, FingerprintMismatch
from ..shared.images import ImageRecord
from ..shared.sources import Skipped, SourceShard
from ..shared.token_store import NO_LABEL, ShardRows, concatenate_rows, empty_rows
from ..shared.views import ViewPolicy
from .extract import ExtractedBatch, extract
from .towers import Tower, TowerSettings, open_tower


def open_same_tower(book: Codebook, tower: str | None, device: str) -> Tower:
    """The codebook's tower, opened where it was or at `tower`; FingerprintMismatch if that is another one."""
    about = book.description
    recorded = TowerSettings(**{name: about[name] for name in TowerSettings.__dataclass_fields__})
    opened = open_tower(replace(recorded, tower=tower) if tower else recorded, device)
    for name, value in opened.description().items():
        if name in TOKEN_FIELDS and value != about[name]:
            raise FingerprintMismatch(
                f"--tower {opened.settings.tower} is not the tower of the codebook: its {name} is {value}, "
                f"the codebook's {about[name]}."
            )
    return opened


@dataclass(frozen=True)
class Encoder:
    """Computes the tokens of images. With `skip`, what cannot be read is listed; without, it raises a DataError."""

    book: Codebook
    tower: Tower
    policy: ViewPolicy
    skip: bool
    batch_size: int
    workers: int

    def batches(
        self, records: Sequence[ImageRecord], first_view: int = 0
    ) -> Iterator[tuple[ExtractedBatch, np.ndarray]]:
        """Yields (batch, tokens (B, V, H, W) uint16) of the records, in order, from view `first_view` on."""
        metric = self.book.description["metric"]
        for batch in extract(
            self.tower,
            records,
            self.policy,
            self.batch_size,
            self.workers,
            metric,
            skip=self.skip,
            first_view=first_view,
        ):
            tokens, _ = self.book.assign(batch.features.reshape(-1, self.tower.dim))
            yield batch, tokens.reshape(*batch.flips.shape, *self.tower.grid)

    def encode(
        self, shard: SourceShard, advance: Advance, before: ShardRows | None = None
    ) -> tuple[ShardRows, Skipped]:
        """The rows of a (local) shard in its order, and what was skipped. Views that `before` holds are kept."""
        skipped: Skipped = []
        records = shard.index(skipped if self.skip else None)
        first_view = before.flips.shape[1] if before else 0
        parts = [empty_rows(self.policy.views - first_view, self.tower.grid)]
        for batch, tokens in self.batches(records, first_view):
            skipped += batch.skipped
            parts.append(self.rows(shard, batch, tokens))
            advance(len(batch.records) + len(batch.skipped))
        rows = concatenate_rows(parts)
        return (_add_views(shard, before, rows) if before else rows), skipped

    @staticmethod
    def rows(shard: SourceShard, batch: ExtractedBatch, tokens: np.ndarray) -> ShardRows:
        """A batch and its tokens as rows of the store."""
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
