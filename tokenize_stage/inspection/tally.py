"""Counts of (row, code) over any number of tokens, in memory that depends on the table alone."""

from itertools import pairwise

import numpy as np

_CELLS_AT_ONCE = 1 << 21
_MOST_WAITING = 1 << 23


class Tally:
    """A table (rows, K) uint32 that is counted up; tokens wait until there are enough to be worth a walk over it."""

    def __init__(self, rows: int, k: int):
        self.k = k
        self._table = np.zeros((rows, k), dtype=np.uint32)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0

    def grow(self, rows: int) -> None:
        """Makes room for `rows` rows."""
        if rows > len(self._table):
            self._flush()
            more = np.zeros((rows - len(self._table), self.k), dtype=np.uint32)
            self._table = np.concatenate([self._table, more])

    def add(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Counts each token (integers of any shape) in its row (integers of the same shape)."""
        # 16 bits are sorted by radix, several times as fast as 32.
        narrow = np.uint16 if len(self._table) <= 1 << 16 else np.uint32
        self._waiting.append((rows.astype(narrow).reshape(-1), tokens.reshape(-1)))
        self._count += tokens.size
        if self._count >= min(self._table.size // 4, _MOST_WAITING):
            self._flush()

    def table(self) -> np.ndarray:
        """(rows, K) uint32: all that was added so far."""
        self._flush()
        return self._table

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows, tokens = (np.concatenate(part) for part in zip(*self._waiting, strict=True))
        self._waiting, self._count = [], 0
        step = max(_CELLS_AT_ONCE // self.k, 1)
        if len(self._table) > step:
            order = np.argsort(rows, kind="stable")
            rows, tokens = rows[order], tokens[order]
            edges = np.searchsorted(rows, np.arange(0, len(self._table) + step, step))
        else:
            edges = np.array([0, len(rows)])
        for block, (start, end) in enumerate(pairwise(edges.tolist())):
            if start < end:
                part = self._table[block * step : (block + 1) * step]
                cells = (rows[start:end].astype(np.int64) - block * step) * self.k + tokens[start:end]
                part += np.bincount(cells, minlength=part.size).reshape(part.shape).astype(np.uint32)
