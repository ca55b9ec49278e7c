"""Counts (row, code) pairs of any number of tokens, in memory that depends on the size of the table alone."""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import Tokens
from ...shared.tokens.rows import ShardRows

_CELLS_AT_ONCE = 1 << 21
_MOST_WAITING = 1 << 23


class Counter:
    """Counts something over the rows of all shards."""

    def add(self, rows: ShardRows) -> None:
        """Counts the rows of the next shard."""
        raise NotImplementedError


class CountTable:
    """A table of counts (rows, K) uint32. Tokens wait until there are enough to be worth a pass over the table."""

    def __init__(self, rows: int, k: int):
        self.k = k
        self._counts = np.zeros((rows, k), dtype=np.uint32)
        self._waiting: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._waiting_tokens = 0

    def grow(self, rows: int) -> None:
        """Makes room for `rows` rows."""
        if rows > len(self._counts):
            self._flush()
            more = np.zeros((rows - len(self._counts), self.k), dtype=np.uint32)
            self._counts = np.concatenate([self._counts, more])

    def add(self, rows: NDArray[np.integer[Any]], tokens: Tokens) -> None:
        """Counts each token in its row; `rows` and `tokens` are of any shape, the same for both."""
        # 16 bits are sorted by radix, several times as fast as 32.
        narrow = np.uint16 if len(self._counts) <= 1 << 16 else np.uint32
        self._waiting.append((rows.astype(narrow).reshape(-1), tokens.reshape(-1)))
        self._waiting_tokens += tokens.size
        if self._waiting_tokens >= min(self._counts.size // 4, _MOST_WAITING):
            self._flush()

    def counts(self) -> NDArray[np.uint32]:
        """(rows, K): everything that was added so far."""
        self._flush()
        return self._counts

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows, tokens = (np.concatenate(part) for part in zip(*self._waiting, strict=True))
        self._waiting, self._waiting_tokens = [], 0
        step = max(_CELLS_AT_ONCE // self.k, 1)
        if len(self._counts) > step:
            order = np.argsort(rows, kind="stable")
            rows, tokens = rows[order], tokens[order]
            edges = np.searchsorted(rows, np.arange(0, len(self._counts) + step, step))
        else:
            edges = np.array([0, len(rows)])
        for block, (start, end) in enumerate(pairwise(edges.tolist())):
            if start < end:
                part = self._counts[block * step : (block + 1) * step]
                cells = (rows[start:end].astype(np.int64) - block * step) * self.k + tokens[start:end]
                part += np.bincount(cells, minlength=part.size).reshape(part.shape).astype(np.uint32)
