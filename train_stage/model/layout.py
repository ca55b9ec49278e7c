"""Which rows a training step has, and what each of them attends to."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .attention import Pattern, Window, make_pattern


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rows a training step has, in which order, and what each attends to.

    Content rows: auxiliary rows by rank (if `auxiliary`), the class token, the visible patches, then the other patches
    by rank (if `patches`), or the mask embeddings in their places. Query rows, if there is a query stream, are those of
    `ranks`. A query, an auxiliary row and a mask embedding in its place all start as mask embedding plus position.
    """

    visible: int
    auxiliary: bool
    patches: bool
    queries: bool
    ranks: Tensor
    """(P,) int64: the ranks, from 0, whose tokens are predicted: by the query stream, or else by the content rows."""
    rank_numbers: tuple[int, ...]
    """The same in the host's memory, so that nobody waits for a GPU to read them."""
    content_windows: tuple[Window, ...]
    """Which content rows the content rows attend to."""
    read_windows: tuple[Window, ...]
    """Which content rows the rows that the head reads attend to."""

    @property
    def content_rows(self) -> int:
        return self.content_windows[-1].rows.stop

    @cached_property
    def pattern(self) -> Pattern:
        """Of the content rows, then the query rows, if there are any: of all blocks but the last."""
        windows = (self.content_windows, self.read_windows) if self.queries else (self.content_windows,)
        return make_pattern(windows, self.content_rows, self.ranks.device)

    @cached_property
    def last_pattern(self) -> Pattern:
        """Of the rows that the head reads: of the last block."""
        return make_pattern((self.read_windows,), self.content_rows, self.ranks.device)
