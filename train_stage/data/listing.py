"""Images of sources whose headers are read, in arrays: about 60 bytes for an image, besides its key."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...shared.labels.columns import NO_LABEL
from ...shared.labels.parsing import Label
from ...shared.runtime.console import progress
from ...shared.sources.keys import KeyLedger, key_digests
from ...shared.sources.records import ImageRecord
from ...shared.sources.sources import SourceShard
from ...shared.tokens.rows import Strings
from .shared_columns import text_at

NOT_LISTED = -1


class _Columns(NamedTuple):
    """n images of one shard, or of all."""

    digests: NDArray[np.uint64]
    """Of the keys (`key_digests`)."""
    key_lengths: NDArray[np.int64]
    """Bytes of each key in UTF-8."""
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.int32]
    files: NDArray[np.int32]


class ListedImages:
    """n images of tars and folders, numbered in the order of their listing and found by their key."""

    def __init__(self, shards: Sequence[SourceShard], lenient: bool) -> None:
        """Lists `shards`; with `lenient`, what is unusable in them is left out.

        Raises DataError for a key that is in two shards, and as `SourceShard.index` does.
        """
        self._labels: dict[Label, int] = {}
        self._paths: dict[str, int] = {}
        ledger, texts, parts = KeyLedger(), list[bytes](), [_no_images()]
        with progress("listing", len(shards), "shards") as advance:
            for shard in shards:
                records = shard.index([] if lenient else None, [])
                keys = [record.key for record in records]
                ledger.add(shard.name, keys)
                texts.append("".join(keys).encode())
                parts.append(self._columns(keys, records))
                advance()
        by_name = {shard.name: shard for shard in shards}
        ledger.refuse_doubles(lambda name: [record.key for record in by_name[name].index([], [])])
        self.columns = _Columns(*map(np.concatenate, zip(*parts, strict=True)))
        self._text = np.frombuffer(b"".join(texts), dtype=np.uint8)
        self._ends = np.cumsum(self.columns.key_lengths)
        self._order = np.argsort(self.columns.digests, kind="stable")
        self._sorted = self.columns.digests[self._order]
        self.different_labels, self.paths = list(self._labels), list(self._paths)

    def _columns(self, keys: list[str], records: list[ImageRecord]) -> _Columns:
        labels, paths = self._labels, self._paths
        numbers = [NO_LABEL if r.label is None else labels.setdefault(r.label, len(labels)) for r in records]
        return _Columns(
            key_digests(keys),
            np.array([len(key.encode()) for key in keys], dtype=np.int64),
            np.array([record.offset for record in records], dtype=np.int64),
            np.array([record.length for record in records], dtype=np.int64),
            np.array(numbers, dtype=np.int32),
            np.array([paths.setdefault(str(record.path), len(paths)) for record in records], dtype=np.int32),
        )

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, number: int) -> str:
        """The key of an image."""
        return text_at(self._text, self._ends, number)

    def label(self, number: int) -> Label | None:
        """The label of an image; None if it has none."""
        place = int(self.columns.labels[number])
        return None if place == NO_LABEL else self.different_labels[place]

    def path(self, number: int) -> str:
        """The file that holds an image."""
        return self.paths[int(self.columns.files[number])]

    def find(self, keys: Strings) -> NDArray[np.int64]:
        """(n,) int64: the number of the image of each key (n,), `NOT_LISTED` where no image has it."""
        found = np.full(len(keys), NOT_LISTED, dtype=np.int64)
        if not len(self):
            return found
        digests = key_digests(keys)
        first, last = (np.searchsorted(self._sorted, digests, side) for side in ("left", "right"))
        for place in np.flatnonzero(first < last).tolist():
            for number in self._order[first[place] : last[place]].tolist():
                if self.key(number) == keys[place]:  # another key may have the same digest
                    found[place] = number
        return found


def _no_images() -> _Columns:
    whole, small = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
    return _Columns(np.empty(0, dtype=np.uint64), whole, whole, whole, small, small)
