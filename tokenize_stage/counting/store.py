"""Counts all statistics that `mapet tokenize inspect` reports, in one pass over a token store (`schema`)."""

from collections import Counter as Counts
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import Tokens
from ...shared.errors import DataError
from ...shared.labels.parsing import Label
from ...shared.runtime.console import progress
from ...shared.runtime.memory import as_text, memory_budget
from ...shared.tokens.rows import NO_LABEL, ShardRows
from ...shared.tokens.store import TokenStore
from .count_table import Counter, CountTable
from .overlaps import OverlapCounter
from .quality import quality_of
from .sample import ImageSample, number_classes
from .schema import (
    Agreement,
    Labels,
    Neighbours,
    Positions,
    StoreStatistics,
    agreement,
    code_statistics,
    code_usage,
    collision,
    information,
)


def count_store(store: TokenStore, more: Iterable[Counter] = (), sample: ImageSample | None = None) -> StoreStatistics:
    """Reads every shard once and counts; the counters in `more` and the `sample` for quality get the same rows.

    Raises DataError for a shard that is damaged or has a token that is not below K, or for a K too large to count.
    """
    _refuse_large_table(store)
    positions, neighbours, labels = _Positions(store), _Neighbours(store.grid), _Labels(store)
    overlaps, sample = OverlapCounter(), sample or ImageSample(store)
    counters: list[Counter] = [positions, neighbours, labels, overlaps, sample, *more]
    with progress("reading tokens", len(store.entries), "shards") as advance:
        for _, rows in store.shards():
            for counter in counters:
                counter.add(rows)
            advance(1)
    table = positions.table.counts()
    counts = table.sum(0, dtype=np.int64)
    return {
        "images": len(store),
        "views": positions.views,
        "tokens": int(counts.sum()),
        "labelled": labels.images,
        **code_statistics(counts),
        "positions": _by_position(table, store.grid),
        "same_place": _same_place(table, counts),
        "neighbours": neighbours.result(table),
        "overlaps": overlaps.result(collision(counts)) if store.views > 1 else None,
        "labels": labels.result(),
        "quality": quality_of(sample.images(), store.k),
    }


def _refuse_large_table(store: TokenStore) -> None:
    """Raises DataError if counts of all codes at all positions do not fit into memory."""
    # Four bytes a count; lists of Python's integers in the report.
    needed, most = store.k * (4 * store.grid[0] * store.grid[1] + 100), memory_budget(None)
    if needed > most:
        raise DataError(
            f"{store.path}: counting each of K = {store.k} codes at each position takes {as_text(needed)}, and "
            f"{as_text(most)} may be used; use a machine with more memory (verify needs no counts)."
        )


class _Positions(Counter):
    """How often each code occurs at each position of the grid."""

    def __init__(self, store: TokenStore):
        self.positions = store.grid[0] * store.grid[1]
        self.table = CountTable(self.positions, store.k)
        self.views = 0

    def add(self, rows: ShardRows) -> None:
        tokens = rows.tokens.reshape(-1, self.positions)
        self.views += len(tokens)
        self.table.add(np.broadcast_to(np.arange(self.positions), tokens.shape), tokens)


def _by_position(table: NDArray[np.uint32], grid: tuple[int, int]) -> Positions:
    views = max(int(table[0].sum()), 1)

    def over_grid(values: list[Any]) -> list[list[Any]]:
        rows: list[list[Any]] = np.array(values).reshape(grid).tolist()
        return rows

    usages = [code_usage(counts) for counts in table]
    return {
        "perplexity": over_grid([usage["perplexity"] for usage in usages]),
        "entropy_bits": over_grid([usage["entropy_bits"] for usage in usages]),
        "used": over_grid([usage["used"] for usage in usages]),
        "top_code": over_grid([int(counts.argmax()) for counts in table]),
        "top_share": over_grid([int(counts.max()) / views for counts in table]),
    }


def _same_place(table: NDArray[np.uint32], counts: NDArray[np.int64]) -> Agreement:
    views = int(table[0].sum())
    equal = sum(_pairs(row) for row in table)
    return agreement(equal, len(table) * views * (views - 1) // 2, collision(counts))


def _pairs(counts: NDArray[np.uint32]) -> int:
    """Number of pairs of tokens that have the same code."""
    wide = counts.astype(np.int64)
    return int((wide * (wide - 1) // 2).sum())


class _Neighbours(Counter):
    """How often patches that touch have the same code, and any two patches of a view."""

    def __init__(self, grid: tuple[int, int]) -> None:
        position = np.arange(grid[0] * grid[1]).reshape(grid)
        self.sides = {
            "horizontal": (position[:, :-1].reshape(-1), position[:, 1:].reshape(-1)),
            "vertical": (position[:-1].reshape(-1), position[1:].reshape(-1)),
        }
        self.positions = position.size
        self.equal, self.anywhere, self.views = dict.fromkeys(self.sides, 0), 0, 0

    def add(self, rows: ShardRows) -> None:
        views = rows.tokens.reshape(-1, self.positions)
        self.views += len(views)
        for way, (first, second) in self.sides.items():
            self.equal[way] += int((views[:, first] == views[:, second]).sum())
        self.anywhere += _pairs_in_rows(views)

    def result(self, table: NDArray[np.uint32]) -> Neighbours:
        pairs = self.views * self.positions * (self.positions - 1) // 2
        return {
            "horizontal": self._side("horizontal", table),
            "vertical": self._side("vertical", table),
            "anywhere": agreement(self.anywhere, pairs, _chance_anywhere(table)),
        }

    def _side(self, way: str, table: NDArray[np.uint32]) -> Agreement:
        first, second = self.sides[way]
        return agreement(self.equal[way], self.views * len(first), _chance(table, first, second))


def _pairs_in_rows(values: Tokens) -> int:
    """Number of pairs of equal values within a row of (n, m), over all rows."""
    ordered = np.sort(values, axis=1)
    starts = np.ones(values.shape, dtype=bool)  # of the runs of equal values
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    runs = np.diff(np.append(np.flatnonzero(starts), values.size))
    return int((runs * (runs - 1) // 2).sum())


def _chance_anywhere(table: NDArray[np.uint32]) -> float | None:
    """`_chance` over all pairs of positions: that of the sum over positions, less each position with itself."""
    positions, views = len(table), float(table[0].sum())
    if not views or positions < 2:
        return None
    total = table.sum(0, dtype=np.float64)
    with_itself = sum(float((counts.astype(np.float64) ** 2).sum()) for counts in table)
    return float(((total**2).sum() - with_itself) / views**2 / (positions * (positions - 1)))


def _chance(table: NDArray[np.uint32], first: NDArray[np.intp], second: NDArray[np.intp]) -> float | None:
    """How often two unrelated views have the same code, one at a position in `first`, the other at its fellow."""
    views = float(table[0].sum())
    if not views or not len(first):
        return None
    equal = sum(table[a].astype(np.float64) @ table[b] for a, b in zip(first, second, strict=True))
    return float(equal / views**2 / len(first))


class _Labels(Counter):
    """How often each class has each code; in a sample of shards also with the labels of images nearby."""

    # Four bytes a cell: 268 MB for the one table, 34 MB for each of the six of the sample.
    _MOST_CELLS, _MOST_CELLS_OF_SAMPLE = 1 << 26, 1 << 23
    _SAMPLE = 8_000_000
    _OFFSETS = (0, -1, 1, 7, 13, 29)

    def __init__(self, store: TokenStore):
        self.k, self.images, self.shards = store.k, 0, 0
        self.every = max(len(store) * store.views * store.grid[0] * store.grid[1] // self._SAMPLE, 1)
        self.classes: dict[Label, int] = {}
        self.sizes: Counts[int] = Counts()
        self.codes = np.zeros(store.k, dtype=np.int64)
        self.table: CountTable | None = CountTable(0, store.k)
        self.by_offset = {offset: CountTable(0, store.k) for offset in self._OFFSETS}

    def add(self, rows: ShardRows) -> None:
        labelled = rows.labels != NO_LABEL
        self.images += int(labelled.sum())
        self.shards += 1
        if not labelled.any():
            return
        tokens = rows.tokens[labelled]
        tokens = tokens.reshape(len(tokens), -1)
        classes = number_classes(rows.labels[labelled], rows.classes, self.classes)
        self.sizes.update(classes.tolist())
        self.codes += np.bincount(tokens.reshape(-1), minlength=self.k)
        cells = len(self.classes) * self.k
        self.table = self.table if cells <= self._MOST_CELLS else None
        self.by_offset = self.by_offset if cells <= self._MOST_CELLS_OF_SAMPLE else {}
        tables = [(0, self.table)] if self.table else []
        if (self.shards - 1) % self.every == 0:
            tables += self.by_offset.items()
        for offset, table in tables:
            table.grow(len(self.classes))
            table.add(np.broadcast_to(np.roll(classes, -offset)[:, None], tokens.shape), tokens)

    def result(self) -> Labels | None:
        if not self.images:
            return None
        of_codes, of_classes = (
            code_usage(np.array(counts))["entropy_bits"] for counts in (self.codes, [*self.sizes.values()])
        )
        mutual, nmi = information(self.table.counts())[2:] if self.table else (None, None)
        return {
            "classes": len(self.classes),
            "images": self.images,
            "tokens": int(self.codes.sum()),
            "class_entropy_bits": of_classes,
            "code_entropy_bits": of_codes,
            "mutual_information_bits": mutual,
            "nmi": nmi,
            "nmi_by_offset": {str(at): information(table.counts())[3] for at, table in self.by_offset.items()},
        }
