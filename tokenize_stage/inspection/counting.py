"""One pass over a token store, a shard at a time, that counts everything `mapet tokenize inspect` says (`figures`)."""

from collections import Counter as Counts
from collections.abc import Iterable

import numpy as np

from ...shared.errors import DataError
from ...shared.runtime.console import progress
from ...shared.tokens.code_usage import usage
from ...shared.tokens.rows import NO_LABEL, ShardRows
from ...shared.tokens.store import TokenStore
from .overlaps import OverlapCounter
from .schema import (
    Agreement,
    Labels,
    Neighbours,
    Positions,
    StoreFigures,
    agreement,
    code_figures,
    collision,
    information,
)
from .tally import Tally


class Counter:
    """Something that is told the rows of every shard, one after the other."""

    def add(self, rows: ShardRows) -> None:
        raise NotImplementedError


def count_store(store: TokenStore, more: Iterable[Counter] = ()) -> StoreFigures:
    """Reads every shard once and counts; each of `more` is told the same rows.

    Raises DataError for a shard that is damaged or holds a token that its codebook does not have.
    """
    places, neighbours, labels = _Places(store), _Neighbours(store.grid), _Labels(store)
    overlaps = OverlapCounter()
    counters = [places, neighbours, labels, overlaps, *more]
    with progress("reading tokens", len(store.entries), "shards") as advance:
        for name, rows in store.shards():
            _refuse_foreign(store, name, rows)
            for counter in counters:
                counter.add(rows)
            advance(1)
    table = places.tally.table()
    counts = table.sum(0, dtype=np.int64)
    return {
        "images": len(store),
        "views": places.views,
        "tokens": int(counts.sum()),
        "labelled": labels.images,
        **code_figures(counts),
        "positions": _positions(table, store.grid),
        "same_place": _same_place(table, counts),
        "neighbours": neighbours.figures(table),
        "overlaps": overlaps.figures(collision(counts)) if store.views > 1 else None,
        "labels": labels.figures(),
    }


def _refuse_foreign(store: TokenStore, name: str, rows: ShardRows) -> None:
    if rows.tokens.size and int(rows.tokens.max()) >= store.k:
        raise DataError(
            f"{store.path}: {name} has token {int(rows.tokens.max())} and K is {store.k}; delete the shard and its "
            ".json and give the same encode-shards command again."
        )


class _Places(Counter):
    """How often each place of the grid has each code."""

    def __init__(self, store: TokenStore):
        self.places = store.grid[0] * store.grid[1]
        self.tally = Tally(self.places, store.k)
        self.views = 0

    def add(self, rows: ShardRows) -> None:
        tokens = rows.tokens.reshape(-1, self.places)
        self.views += len(tokens)
        self.tally.add(np.broadcast_to(np.arange(self.places), tokens.shape), tokens)


def _positions(table: np.ndarray, grid: tuple[int, int]) -> Positions:
    views = max(int(table[0].sum()), 1)

    def over_grid(values: list) -> list[list]:
        return np.array(values).reshape(grid).tolist()

    figures = [usage(counts) for counts in table]
    return {
        "perplexity": over_grid([one["perplexity"] for one in figures]),
        "entropy_bits": over_grid([one["entropy_bits"] for one in figures]),
        "used": over_grid([one["used"] for one in figures]),
        "top_code": over_grid([int(counts.argmax()) for counts in table]),
        "top_share": over_grid([int(counts.max()) / views for counts in table]),
    }


def _same_place(table: np.ndarray, counts: np.ndarray) -> Agreement:
    views = int(table[0].sum())
    equal = sum(_pairs(row) for row in table)
    return agreement(equal, len(table) * views * (views - 1) // 2, collision(counts))


def _pairs(counts: np.ndarray) -> int:
    """In how many ways two tokens of the same code can be taken."""
    counts = counts.astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


class _Neighbours(Counter):
    """How often patches that touch have the same code, and any two patches of a view."""

    def __init__(self, grid: tuple[int, int]) -> None:
        place = np.arange(grid[0] * grid[1]).reshape(grid)
        self.sides = {
            "horizontal": (place[:, :-1].reshape(-1), place[:, 1:].reshape(-1)),
            "vertical": (place[:-1].reshape(-1), place[1:].reshape(-1)),
        }
        self.places = place.size
        self.equal, self.anywhere, self.views = dict.fromkeys(self.sides, 0), 0, 0

    def add(self, rows: ShardRows) -> None:
        views = rows.tokens.reshape(-1, self.places)
        self.views += len(views)
        for way, (one, other) in self.sides.items():
            self.equal[way] += int((views[:, one] == views[:, other]).sum())
        self.anywhere += _pairs_in_rows(views)

    def figures(self, table: np.ndarray) -> Neighbours:
        found = {
            way: agreement(self.equal[way], self.views * len(one), _chance(table, one, other))
            for way, (one, other) in self.sides.items()
        }
        pairs = self.views * self.places * (self.places - 1) // 2
        return {**found, "anywhere": agreement(self.anywhere, pairs, _chance_anywhere(table))}


def _pairs_in_rows(values: np.ndarray) -> int:
    """In how many ways two equal values can be taken from one row of (n, m), over all rows."""
    ordered = np.sort(values, axis=1)
    starts = np.ones(values.shape, dtype=bool)  # of the runs of equal values
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    runs = np.diff(np.append(np.flatnonzero(starts), values.size))
    return int((runs * (runs - 1) // 2).sum())


def _chance_anywhere(table: np.ndarray) -> float | None:
    """`_chance` over all pairs of places: those of the sum of all places, less each place with itself."""
    places, views = len(table), float(table[0].sum())
    if not views or places < 2:
        return None
    whole = table.sum(0, dtype=np.float64)
    own = sum(float((counts.astype(np.float64) ** 2).sum()) for counts in table)
    return float(((whole**2).sum() - own) / views**2 / (places * (places - 1)))


def _chance(table: np.ndarray, ones: np.ndarray, others: np.ndarray) -> float | None:
    """How often the codes at places `ones` are those at `others` in views that have nothing to do with each other."""
    views = float(table[0].sum())
    if not views or not len(ones):
        return None
    equal = sum(table[a].astype(np.float64) @ table[b] for a, b in zip(ones, others, strict=True))
    return float(equal / views**2 / len(ones))


class _Labels(Counter):
    """How often each class has each code; in a sample also with the labels of images nearby."""

    # Four bytes a cell: 268 MB for the one table, 34 MB for each of the six of the sample.
    _MOST_CELLS, _MOST_CELLS_OF_SAMPLE = 1 << 26, 1 << 23
    _SAMPLE = 8_000_000
    _OFFSETS = (0, -1, 1, 7, 13, 29)

    def __init__(self, store: TokenStore):
        self.k, self.images, self.shards = store.k, 0, 0
        self.every = max(len(store) * store.views * store.grid[0] * store.grid[1] // self._SAMPLE, 1)
        self.classes: dict[int, int] = {}
        self.sizes: Counts[int] = Counts()
        self.codes = np.zeros(store.k, dtype=np.int64)
        self.tally: Tally | None = Tally(0, store.k)
        self.by_offset = {offset: Tally(0, store.k) for offset in self._OFFSETS}

    def add(self, rows: ShardRows) -> None:
        labelled = rows.labels != NO_LABEL
        self.images += int(labelled.sum())
        self.shards += 1
        if not labelled.any():
            return
        tokens = rows.tokens[labelled]
        tokens = tokens.reshape(len(tokens), -1)
        numbers = self._numbers(rows.labels[labelled])
        self.sizes.update(numbers.tolist())
        self.codes += np.bincount(tokens.reshape(-1), minlength=self.k)
        cells = len(self.classes) * self.k
        self.tally = self.tally if cells <= self._MOST_CELLS else None
        self.by_offset = self.by_offset if cells <= self._MOST_CELLS_OF_SAMPLE else {}
        tallies = [(0, self.tally)] if self.tally else []
        if (self.shards - 1) % self.every == 0:
            tallies += self.by_offset.items()
        for offset, tally in tallies:
            tally.grow(len(self.classes))
            tally.add(np.broadcast_to(np.roll(numbers, -offset)[:, None], tokens.shape), tokens)

    def _numbers(self, labels: np.ndarray) -> np.ndarray:
        """Labels as classes from 0 on, in the order in which they were seen."""
        found, back = np.unique(labels, return_inverse=True)
        return np.array([self.classes.setdefault(label, len(self.classes)) for label in found.tolist()])[back]

    def figures(self) -> Labels | None:
        if not self.images:
            return None
        of_codes, of_classes = (usage(np.array(part))["entropy_bits"] for part in (self.codes, [*self.sizes.values()]))
        mutual, nmi = information(self.tally.table())[2:] if self.tally else (None, None)
        return {
            "classes": len(self.classes),
            "images": self.images,
            "tokens": int(self.codes.sum()),
            "class_entropy_bits": of_classes,
            "code_entropy_bits": of_codes,
            "mutual_information_bits": mutual,
            "nmi": nmi,
            "nmi_by_offset": {str(at): information(tally.table())[3] for at, tally in self.by_offset.items()},
        }
