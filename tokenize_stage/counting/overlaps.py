"""Finds where two views of one image show the same patch, and compares its codes."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import Tokens
from ...shared.tokens.rows import ShardRows, take_rows
from .count_table import Counter
from .schema import Agreement, Overlaps, Supposition, agreement


def seen_in(
    crops: NDArray[np.float64],
    flips: NDArray[np.bool_],
    other_crops: NDArray[np.float64],
    other_flips: NDArray[np.bool_],
    grid: tuple[int, int],
    other_grid: tuple[int, int] | None = None,
) -> NDArray[np.int64]:
    """Finds the patch of another view that contains the centre of each patch of this one, for n pairs of views.

    Args:
        crops: (n, 4) boxes of the views: top, left, height, width in source pixels.
        flips: (n,) whether the views are mirrored.
        other_crops: (n, 4) boxes of the other views.
        other_flips: (n,) whether the other views are mirrored.
        grid: rows and columns (H, W) of patches.
        other_grid: those of the other views, if they are not the same.

    Returns:
        (n, H * W) the other view's patches, counted row by row; -1 where the centre lies outside its box.
    """
    height, width = grid
    other_height, other_width = other_grid or grid
    down = (np.arange(height) + 0.5) / height
    across = (np.arange(width) + 0.5) / width
    y = crops[:, :1] + down * crops[:, 2:3]
    x = crops[:, 1:2] + np.where(flips[:, None], 1 - across, across) * crops[:, 3:]
    row = np.floor((y - other_crops[:, :1]) / other_crops[:, 2:3] * other_height).astype(np.int64)
    share = (x - other_crops[:, 1:2]) / other_crops[:, 3:]
    column = np.floor(np.where(other_flips[:, None], 1 - share, share) * other_width).astype(np.int64)
    inside_rows, inside_columns = (row >= 0) & (row < other_height), (column >= 0) & (column < other_width)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    patches: NDArray[np.int64] = np.where(inside, row[:, :, None] * other_width + column[:, None, :], -1)
    return patches.reshape(len(crops), height * width)


def arrangements(tokens: Tokens, before: Tokens, after: Tokens, flips: NDArray[np.bool_]) -> dict[str, Tokens]:
    """The tokens as stored, and what they would have to be under each known fault.

    Args:
        tokens: (n, V, H, W) as stored.
        before: (n, V, H, W) stored with the rows before.
        after: (n, V, H, W) stored with the rows after.
        flips: (n, V), whether each view is mirrored.

    Returns:
        Arrays (n, V, H, W) by sign: "as-stored", and the keys of `inspection.warnings.FAULTS` that can apply.
    """
    mirrored = tokens[..., ::-1]
    # If each image has the tokens of the next one, its own are those stored with the image before.
    arranged = {"as-stored": tokens, "next": before, "previous": after, "mirrored": mirrored}
    if flips.any() and not flips.all():
        arranged["flips-ignored"] = np.where(flips[:, :, None, None], mirrored, tokens)
    if tokens.shape[2] == tokens.shape[3]:
        arranged["transposed"] = tokens.swapaxes(2, 3)
    return arranged


class OverlapCounter(Counter):
    """How often a patch that two views of one image show has the same code in both, over all pairs of views."""

    # Images per shard for which the faults are tried.
    _SAMPLE = 256

    def __init__(self) -> None:
        self.view_pairs = 0
        self.pairs, self.equal = np.zeros(2, np.int64), np.zeros(2, np.int64)
        self.supposed: dict[str, _Supposed] = {}

    def add(self, rows: ShardRows) -> None:
        if rows.tokens.shape[1] < 2:
            return
        tokens = rows.tokens.reshape(*rows.tokens.shape[:2], -1)
        for first, second in combinations(range(tokens.shape[1]), 2):
            patches = _patches_in(rows, first, second)
            pairs, equal = (patches >= 0).sum(1), _equal(tokens[:, first], tokens[:, second], patches)
            mirrored = (rows.flips[:, first] != rows.flips[:, second]).astype(int)
            self.view_pairs += int((pairs > 0).sum())
            self.pairs += np.bincount(mirrored, pairs, minlength=2).astype(np.int64)
            self.equal += np.bincount(mirrored, equal, minlength=2).astype(np.int64)
        self._suppose(take_rows(rows, range(min(len(rows), self._SAMPLE))))

    def _suppose(self, rows: ShardRows) -> None:
        if len(rows) < 4:
            return  # too few other images to compare with
        as_stored = None
        overlaps = {pair: _patches_in(rows, *pair) for pair in combinations(range(rows.tokens.shape[1]), 2)}
        pairs = int(sum((patches >= 0).sum() for patches in overlaps.values()))
        # Codes that depend on the position in the grid agree in any two images; only what exceeds that counts.
        arranged, of_others = (_arranged(rows, by) for by in (0, len(rows) // 2))
        for sign, tokens in arranged.items():
            equal, chance = (_equal_in_all(tokens, others, overlaps) for others in (tokens, of_others[sign]))
            beyond = (equal - chance).astype(np.float64)
            as_stored = beyond if as_stored is None else as_stored
            self.supposed.setdefault(sign, _Supposed()).add(pairs, equal, chance, beyond - as_stored)

    def result(self, chance: float | None) -> Overlaps:
        """The counts as JSON; `chance` is the share of equal codes among unrelated tokens."""

        def agreement_of(pairs: np.int64, equal: np.int64) -> Agreement:
            return agreement(int(equal), int(pairs), chance)

        return {
            "view_pairs": self.view_pairs,
            "all": agreement_of(self.pairs.sum(), self.equal.sum()),
            "same_flip": agreement_of(self.pairs[0], self.equal[0]),
            "other_flip": agreement_of(self.pairs[1], self.equal[1]),
            "supposing": {sign: supposed.result() for sign, supposed in self.supposed.items() if supposed.pairs},
        }


class _Supposed:
    """How well the views of a sample of images agree if a certain fault is undone."""

    def __init__(self) -> None:
        self.images = self.pairs = self.equal = self.chance = 0
        self.gain = self.gain_squared = 0.0

    def add(self, pairs: int, equal: NDArray[np.int64], chance: NDArray[np.int64], gain: NDArray[np.float64]) -> None:
        """Counts the images of one shard: arrays (images,) but for `pairs`, which is their total."""
        self.images += len(equal)
        self.pairs += pairs
        self.equal += int(equal.sum())
        self.chance += int(chance.sum())
        self.gain += float(gain.sum())
        self.gain_squared += float((gain**2).sum())

    def result(self) -> Supposition:
        # Images, not patches, are independent of each other.
        variance = max(self.gain_squared - self.gain**2 / self.images, 0.0)
        return {
            "images": self.images,
            "pairs": self.pairs,
            "equal": self.equal,
            "share": self.equal / self.pairs,
            "chance": self.chance / self.pairs,
            "sigmas": self.gain / variance**0.5 if variance else 0.0,
        }


def _arranged(rows: ShardRows, by: int) -> dict[str, Tokens]:
    """`arrangements` (n, V, H * W) of the tokens `by` rows further back, with each row's own flips."""
    before, tokens, after = (np.roll(rows.tokens, by + step, axis=0) for step in (1, 0, -1))
    arranged = arrangements(tokens, before, after, rows.flips)
    return {sign: tokens.reshape(*tokens.shape[:2], -1) for sign, tokens in arranged.items()}


def _patches_in(rows: ShardRows, view: int, other: int) -> NDArray[np.int64]:
    """`seen_in` for two of the views of each row."""
    crops, flips = rows.crops, rows.flips
    height, width = rows.tokens.shape[2:]
    return seen_in(crops[:, view], flips[:, view], crops[:, other], flips[:, other], (height, width))


def _equal(tokens: Tokens, others: Tokens, patches: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of n pairs of views (n, H * W), how many patches have the same code in both; `patches` as `seen_in`."""
    same = np.take_along_axis(others, np.maximum(patches, 0), axis=1) == tokens
    counts: NDArray[np.int64] = (same & (patches >= 0)).sum(1)
    return counts


def _equal_in_all(
    tokens: Tokens, others: Tokens, overlaps: dict[tuple[int, int], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """`_equal` summed over all pairs of views, of tokens and others (n, V, H * W)."""
    counts = np.zeros(len(tokens), dtype=np.int64)
    for (view, other), patches in overlaps.items():
        counts += _equal(tokens[:, view], others[:, other], patches)
    return counts
