"""A uniform sample of a store's images that depends on their keys alone, in bounded memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.labels.parsing import Label
from ...shared.sources.keys import key_digests
from ...shared.tokens.rows import NO_LABEL, ShardRows
from ...shared.tokens.store import TokenStore
from .count_table import Counter

MOST_TOKENS = 4_000_000


@dataclass(frozen=True)
class SampledImages:
    """n images with V views each, in the order of the hashes of their keys, which is a random order."""

    hashes: NDArray[np.uint64]
    """(n,): `key_digests`, ascending."""
    tokens: NDArray[Any]
    """(n, V, H, W), of any integer type."""
    crops: NDArray[np.float64]
    """(n, V, 4)."""
    flips: NDArray[np.bool_]
    """(n, V)."""
    labels: NDArray[np.int64]
    """(n,): class numbers from 0 on; -1 for an image without a label."""


class ImageSample(Counter):
    """Keeps the images whose keys have the smallest hashes, as many as have about `most_tokens` tokens.

    The same images are sampled whatever the order of the shards is, and two stores of the same images have the same
    sample or, where one has more tokens per image, one sample that contains the other.
    """

    def __init__(self, store: TokenStore, most_tokens: int = MOST_TOKENS):
        per_image = store.views * store.grid[0] * store.grid[1]
        self.most = max(most_tokens // per_image, 1)
        self._classes: dict[Label, int] = {}
        self._bound = np.uint64(2**64 - 1)
        empty = np.empty(0, np.uint64), np.empty((0, store.views, *store.grid), np.uint16)
        no_views = np.empty((0, store.views, 4)), np.empty((0, store.views), np.bool_)
        self._parts: list[tuple[NDArray[Any], ...]] = [(*empty, *no_views, np.empty(0, np.int64))]
        self._images = 0

    def add(self, rows: ShardRows) -> None:
        hashes = key_digests(rows.keys)
        labels = number_classes(rows.labels, rows.classes, self._classes)
        chosen = np.flatnonzero(hashes <= self._bound)
        # Indexing copies, so that the shard does not stay in memory.
        columns = (hashes, rows.tokens, rows.crops, rows.flips, labels)
        self._parts.append(tuple(column[chosen] for column in columns))
        self._images += len(chosen)
        if self._images > 2 * self.most:
            self._keep_smallest()

    def images(self) -> SampledImages:
        """The sample of everything that was added so far."""
        self._keep_smallest()
        return SampledImages(*self._parts[0])

    def _keep_smallest(self) -> None:
        columns = [np.concatenate(part) for part in zip(*self._parts, strict=True)]
        smallest = np.argsort(columns[0], kind="stable")[: self.most]
        self._parts, self._images = [tuple(column[smallest] for column in columns)], len(smallest)
        if len(smallest) == self.most:
            self._bound = columns[0][smallest[-1]]


def number_classes(
    labels: NDArray[np.int64], names: Sequence[str] | None, classes: dict[Label, int]
) -> NDArray[np.int64]:
    """The labels of a shard as class numbers (n,), the same in all shards; -1 for an image without a label.

    Args:
        labels: (n,) as in `ShardRows`.
        names: the names that they are indices of, if the shard has class names.
        classes: the number of each class so far, from 0 on in the order of occurrence; new classes are added.
    """
    distinct, back = np.unique(labels, return_inverse=True)
    of_shard: list[Label] = distinct.tolist() if names is None else [names[label] for label in distinct.tolist()]
    numbers = [
        NO_LABEL if number == NO_LABEL else classes.setdefault(label, len(classes))
        for number, label in zip(distinct.tolist(), of_shard, strict=True)
    ]
    return np.array(numbers, np.int64)[back]
