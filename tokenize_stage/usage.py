"""The figures of a token store: one pass over its shards, one shard in memory at a time.

`count_store` gives a `StoreFigures`: the part of `mapet tokenize inspect --json` that is counted. All are plain JSON
values; a share of nothing is None, never NaN.
"""

from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np

from ..shared.codebook import usage
from ..shared.console import progress
from ..shared.errors import DataError
from ..shared.token_rows import NO_LABEL, ShardRows
from ..shared.token_store import TokenStore
from .overlaps import OverlapCounter
from .tally import Tally


class Agreement(TypedDict):
    """How often two tokens are the same code."""

    pairs: int
    equal: int
    share: float | None
    """equal / pairs."""
    chance: float | None
    """The share that would be expected of two tokens that have nothing to do with each other."""


class Usage(TypedDict):
    """How evenly codes are used (`shared.codebook.usage`)."""

    codes: int
    used: int
    dead: int
    entropy_bits: float
    perplexity: float


class Cover(TypedDict):
    """The fewest codes that together are `share` of all tokens."""

    share: float
    codes: int
    of_k: float
    """codes / K."""


class Positions(TypedDict):
    """One value for each place of the grid, row by row (H lists of W), over all images and views."""

    perplexity: list[list[float]]
    entropy_bits: list[list[float]]
    used: list[list[int]]
    top_code: list[list[int]]
    """The most used code there (the smallest of equals)."""
    top_share: list[list[float]]
    """Its share of the tokens there."""


class Neighbours(TypedDict):
    """Patches beside and above each other in one view; `chance` is two views drawn at random, at the same two places."""

    horizontal: Agreement
    vertical: Agreement


class Supposition(TypedDict):
    """How well overlapping views of a sample of images agree if their tokens had been stored with a certain fault."""

    images: int
    pairs: int
    equal: int
    share: float
    chance: float
    """The same patches, with the second view taken from another image: what the place in the grid alone gives."""
    sigmas: float
    """By how many standard errors (over images) share - chance is higher than that of the tokens as they are."""


class Overlaps(TypedDict):
    """Two views of one image: patches of the earlier one whose centre lies in the later one, through crop and flip."""

    view_pairs: int
    """Pairs of views of one image that have such a patch."""
    all: Agreement
    same_flip: Agreement
    """Both views are mirrored, or neither."""
    other_flip: Agreement
    """One of the two is mirrored."""
    supposing: dict[str, Supposition]
    """as-stored; next, previous (tokens of the image after, before); mirrored; flips-ignored (mirrored views only);
    transposed (rows and columns swapped)."""


class Labels(TypedDict):
    """What a code says about the class of its image, over the tokens of all labelled images."""

    classes: int
    images: int
    tokens: int
    class_entropy_bits: float
    code_entropy_bits: float
    mutual_information_bits: float
    nmi: float | None
    """mutual information / mean of the two entropies."""
    nmi_by_offset: dict[str, float | None]
    """The same with the label of the image that many rows further in the shard (around its end): "-1" and "1" are what
    a shift by one image would make of it, the others what chance gives. Empty where it would take too much memory."""


class StoreFigures(TypedDict):
    """All that is counted in one pass."""

    images: int
    views: int
    tokens: int
    labelled: int
    counts: list[int]
    """Of each of the K codes."""
    usage: Usage
    coverage: list[Cover]
    """For 50, 90 and 99 % of the tokens."""
    most_used: list[list[int]]
    """[code, count], at most ten."""
    least_used: list[list[int]]
    """The same of the codes that are used at all, the rarest first."""
    dead_codes: list[int]
    positions: Positions
    same_place: Agreement
    """Two different views drawn at random, at the same place; `chance` is at any two places."""
    neighbours: Neighbours
    overlaps: Overlaps | None
    """None where one view of each image is stored."""
    labels: Labels | None
    """None where no image has a label."""


_EXTREMES = 10
_COVER = (0.5, 0.9, 0.99)


class Counter:
    """Something that is told the rows of every shard, one after the other."""

    def add(self, rows: ShardRows) -> None:
        raise NotImplementedError


def count_store(store: TokenStore, more: Iterable[Counter] = ()) -> StoreFigures:
    """Reads every shard once and counts; each of `more` is told the same rows.

    Raises DataError for a shard that is damaged or holds a token that its codebook does not have.
    """
    places, neighbours, labels = _Places(store), _Neighbours(), _Labels(store.k)
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
        "neighbours": neighbours.figures(table, store.grid),
        "overlaps": overlaps.figures(collision(counts)) if store.views > 1 else None,
        "labels": labels.figures(),
    }


def _refuse_foreign(store: TokenStore, name: str, rows: ShardRows) -> None:
    if rows.tokens.size and int(rows.tokens.max()) >= store.k:
        raise DataError(
            f"{store.path}: {name} has token {int(rows.tokens.max())} and K is {store.k}; delete the shard and its "
            ".json and give the same encode-shards command again."
        )


def code_figures(counts: np.ndarray) -> dict[str, Any]:
    """`counts`, `usage`, `coverage`, `most_used`, `least_used` and `dead_codes` of counts (K,)."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    pick = [[int(code), int(counts[code])] for code in order]
    covered = np.cumsum(counts[order])
    needed = [int(np.searchsorted(covered, share * covered[-1])) + 1 if len(order) else 0 for share in _COVER]
    return {
        "counts": counts.tolist(),
        "usage": usage(counts),
        "coverage": [
            {"share": share, "codes": codes, "of_k": codes / len(counts)}
            for share, codes in zip(_COVER, needed, strict=True)
        ],
        "most_used": pick[:_EXTREMES],
        "least_used": pick[::-1][:_EXTREMES],
        "dead_codes": np.flatnonzero(counts == 0).tolist(),
    }


def agreement(equal: int, pairs: int, chance: float | None) -> Agreement:
    """`equal` of `pairs`, as JSON."""
    return {"pairs": int(pairs), "equal": int(equal), "share": equal / pairs if pairs else None, "chance": chance}


def collision(counts: np.ndarray) -> float | None:
    """How often two tokens, drawn with replacement, are the same code; None without tokens."""
    share = counts / max(counts.sum(), 1)
    return float((share**2).sum()) if counts.any() else None


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
    """How often patches that touch have the same code."""

    def __init__(self) -> None:
        self.equal, self.pairs = [0, 0], [0, 0]

    def add(self, rows: ShardRows) -> None:
        tokens = rows.tokens
        sides = (tokens[..., :-1], tokens[..., 1:]), (tokens[..., :-1, :], tokens[..., 1:, :])
        for way, (one, other) in enumerate(sides):
            self.equal[way] += int((one == other).sum())
            self.pairs[way] += one.size

    def figures(self, table: np.ndarray, grid: tuple[int, int]) -> Neighbours:
        height, width = grid
        place = np.arange(height * width).reshape(grid)
        sides = (place[:, :-1], place[:, 1:]), (place[:-1], place[1:])
        across, down = (_chance(table, one.reshape(-1), other.reshape(-1)) for one, other in sides)
        return {
            "horizontal": agreement(self.equal[0], self.pairs[0], across),
            "vertical": agreement(self.equal[1], self.pairs[1], down),
        }


def _chance(table: np.ndarray, ones: np.ndarray, others: np.ndarray) -> float | None:
    """How often the codes at places `ones` are those at `others` in views that have nothing to do with each other."""
    views = float(table[0].sum())
    if not views or not len(ones):
        return None
    equal = sum(table[a].astype(np.float64) @ table[b] for a, b in zip(ones, others, strict=True))
    return float(equal / views**2 / len(ones))


class _Labels(Counter):
    """How often each class has each code, and would have with the labels of images nearby."""

    # 17 million cells are 64 MB a table; more classes x codes are more than memory should be spent on.
    _MOST_CELLS = 1 << 24
    _OFFSETS = (-1, 1, 7, 13, 29)

    def __init__(self, k: int):
        self.k, self.images = k, 0
        self.classes: dict[int, int] = {}
        self.tallies = {offset: Tally(0, k) for offset in (0, *self._OFFSETS)}

    def add(self, rows: ShardRows) -> None:
        labelled = rows.labels != NO_LABEL
        self.images += int(labelled.sum())
        if not labelled.any():
            return
        labels, tokens = rows.labels[labelled], rows.tokens[labelled]
        tokens = tokens.reshape(len(tokens), -1)
        for label in np.unique(labels).tolist():
            self.classes.setdefault(label, len(self.classes))
        if len(self.classes) * self.k > self._MOST_CELLS:
            self.tallies = {0: self.tallies[0]}
        found, back = np.unique(labels, return_inverse=True)
        number = np.array([self.classes[label] for label in found.tolist()])[back]
        for offset, tally in self.tallies.items():
            tally.grow(len(self.classes))
            tally.add(np.broadcast_to(np.roll(number, -offset)[:, None], tokens.shape), tokens)

    def figures(self) -> Labels | None:
        if not self.images:
            return None
        tables = {offset: tally.table() for offset, tally in self.tallies.items()}
        of_codes, of_classes, mutual, nmi = information(tables[0])
        return {
            "classes": len(self.classes),
            "images": self.images,
            "tokens": int(tables[0].sum()),
            "class_entropy_bits": of_classes,
            "code_entropy_bits": of_codes,
            "mutual_information_bits": mutual,
            "nmi": nmi,
            "nmi_by_offset": {str(offset): information(table)[3] for offset, table in tables.items() if offset},
        }


def information(table: np.ndarray) -> tuple[float, float, float, float | None]:
    """Of counts (classes, K): entropy of codes, of classes, mutual information in bits; normalised by their mean."""
    of_codes, of_classes = (usage(table.sum(axis, dtype=np.int64))["entropy_bits"] for axis in (0, 1))
    whole = int(table.sum())
    joint = 0.0
    for row in table:  # a class at a time, so that no second table of floats is held
        share = row[row > 0] / whole
        joint -= float((share * np.log2(share)).sum())
    mutual = max(of_codes + of_classes - joint, 0.0)
    mean = (of_codes + of_classes) / 2
    return of_codes, of_classes, mutual, mutual / mean if mean else None
