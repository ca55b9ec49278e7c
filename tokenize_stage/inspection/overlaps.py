"""Where two views of one image see the same patch, and whether it got the same code in both."""

from itertools import combinations
from typing import Any

import numpy as np

from ...shared.tokens.rows import ShardRows, take_rows
from .faults import arrangements


def seen_in(
    crops: np.ndarray, flips: np.ndarray, other_crops: np.ndarray, other_flips: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Which patch of another view holds the centre of each patch of this one, for n pairs of views.

    `crops` are (n, 4) boxes (top, left, height, width) in source pixels, `flips` (n,) bool. Returns (n, H * W) int64:
    the other view's patches, counted row by row, -1 where the centre lies outside its box.
    """
    height, width = grid
    down = (np.arange(height) + 0.5) / height
    across = (np.arange(width) + 0.5) / width
    y = crops[:, :1] + down * crops[:, 2:3]
    x = crops[:, 1:2] + np.where(flips[:, None], 1 - across, across) * crops[:, 3:]
    row = np.floor((y - other_crops[:, :1]) / other_crops[:, 2:3] * height).astype(np.int64)
    share = (x - other_crops[:, 1:2]) / other_crops[:, 3:]
    column = np.floor(np.where(other_flips[:, None], 1 - share, share) * width).astype(np.int64)
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None, :]
    return np.where(inside, row[:, :, None] * width + column[:, None, :], -1).reshape(len(crops), -1)


class OverlapCounter:
    """How often a patch that two views of one image see has the same code in both, all pairs of views."""

    # Of each shard, for what is asked of a sample only: whether tokens would fit better if they were stored otherwise.
    _SAMPLE = 256

    def __init__(self) -> None:
        self.view_pairs = 0
        self.pairs, self.equal = np.zeros(2, np.int64), np.zeros(2, np.int64)
        self.supposed: dict[str, _Supposed] = {}

    def add(self, rows: ShardRows) -> None:
        if rows.tokens.shape[1] < 2:
            return
        tokens = rows.tokens.reshape(*rows.tokens.shape[:2], -1)
        for one, other in combinations(range(tokens.shape[1]), 2):
            there = _there(rows, one, other)
            pairs, equal = (there >= 0).sum(1), _equal(tokens[:, one], tokens[:, other], there)
            mirrored = (rows.flips[:, one] != rows.flips[:, other]).astype(int)
            self.view_pairs += int((pairs > 0).sum())
            self.pairs += np.bincount(mirrored, pairs, minlength=2).astype(np.int64)
            self.equal += np.bincount(mirrored, equal, minlength=2).astype(np.int64)
        self._suppose(take_rows(rows, range(min(len(rows), self._SAMPLE))))

    def _suppose(self, rows: ShardRows) -> None:
        if len(rows) < 4:
            return  # no other image to compare with
        as_stored = None
        theres = {pair: _there(rows, *pair) for pair in combinations(range(rows.tokens.shape[1]), 2)}
        pairs = int(sum((there >= 0).sum() for there in theres.values()))
        # Codes that depend on the place in the grid agree in any two images; only what is beyond that counts.
        own, foreign = (_arranged(rows, by) for by in (0, len(rows) // 2))
        for sign, tokens in own.items():
            equal, chance = (
                sum(_equal(tokens[:, one], second[:, other], there) for (one, other), there in theres.items())
                for second in (tokens, foreign[sign])
            )
            beyond = (equal - chance).astype(np.float64)
            as_stored = beyond if as_stored is None else as_stored
            self.supposed.setdefault(sign, _Supposed()).add(pairs, equal, chance, beyond - as_stored)

    def figures(self, chance: float | None) -> dict[str, Any]:
        """`usage.Overlaps`."""

        def agreement(pairs: int, equal: int) -> dict[str, Any]:
            return {
                "pairs": int(pairs),
                "equal": int(equal),
                "share": float(equal / pairs) if pairs else None,
                "chance": chance,
            }

        return {
            "view_pairs": self.view_pairs,
            "all": agreement(self.pairs.sum(), self.equal.sum()),
            "same_flip": agreement(self.pairs[0], self.equal[0]),
            "other_flip": agreement(self.pairs[1], self.equal[1]),
            "supposing": {sign: supposed.figures() for sign, supposed in self.supposed.items() if supposed.pairs},
        }


class _Supposed:
    """How well the views of a sample of images agree, if their tokens were stored in a certain way."""

    def __init__(self) -> None:
        self.images = self.pairs = self.equal = self.chance = 0
        self.gain = self.gain_squared = 0.0

    def add(self, pairs: int, equal: np.ndarray, chance: np.ndarray, gain: np.ndarray) -> None:
        self.images += len(equal)
        self.pairs += pairs
        self.equal += int(equal.sum())
        self.chance += int(chance.sum())
        self.gain += float(gain.sum())
        self.gain_squared += float((gain**2).sum())

    def figures(self) -> dict[str, Any]:
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


def _arranged(rows: ShardRows, by: int) -> dict[str, np.ndarray]:
    """`arrangements` of the tokens of the rows `by` further back, laid out by each row's own flips, (n, V, H * W)."""
    before, tokens, after = (np.roll(rows.tokens, by + step, axis=0) for step in (1, 0, -1))
    found = arrangements(tokens, before, after, rows.flips)
    return {sign: tokens.reshape(*tokens.shape[:2], -1) for sign, tokens in found.items()}


def _there(rows: ShardRows, one: int, other: int) -> np.ndarray:
    crops, flips = rows.crops, rows.flips
    return seen_in(crops[:, one], flips[:, one], crops[:, other], flips[:, other], rows.tokens.shape[2:])


def _equal(tokens: np.ndarray, others: np.ndarray, there: np.ndarray) -> np.ndarray:
    """For each of n pairs of views, how many patches of the one (n, H * W) have their code in the other, too."""
    found = np.take_along_axis(others, np.maximum(there, 0), axis=1)
    return ((found == tokens) & (there >= 0)).sum(1)
