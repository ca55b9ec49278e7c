"""The rows of a training step, and the rows that each of them attends to."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .attention import Pattern, Window, make_pattern


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rows a training step has, in which order, and what each attends to.

    The content stream holds the auxiliary rows by rank (if `auxiliary`), the class token, the visible patches, and then
    the other patches by rank (if `patches`) or mask embeddings at their positions. If `queries`, the query stream holds
    one row for each of `ranks`. Queries, auxiliary rows and mask embeddings all start as mask embedding plus position.
    """

    visible: int
    """The number of visible patches, class token not counted."""
    auxiliary: bool
    """Whether the content stream has auxiliary rows."""
    patches: bool
    """Whether the content stream has the patches that are predicted, rather than mask embeddings in their places."""
    queries: bool
    """Whether there is a query stream; without one the last content rows are read by the head."""
    ranks: Tensor
    """(P,) int64: the ranks, from 0, whose tokens are predicted."""
    rank_numbers: tuple[int, ...]
    """The same in host memory, so that reading them does not wait for a GPU."""
    content_windows: tuple[Window, ...]
    """The content rows that each content row attends to."""
    predicted_windows: tuple[Window, ...]
    """The content rows that each predicted row attends to: the query rows, or else the last content rows."""
    flex: bool = False
    """Whether FlexAttention computes it."""

    @property
    def content_rows(self) -> int:
        """The number of rows of the content stream, which are also the keys."""
        return int(self.content_windows[-1].rows.stop)

    @property
    def predicted_rows(self) -> int:
        """P, the number of rows that the head reads."""
        return len(self.rank_numbers)

    @property
    def nbytes(self) -> int:
        """The most memory that the ranks and masks take, in bytes, those of patterns that are not made yet included."""
        windows = (*self.content_windows, *self.predicted_windows)
        size = self.ranks.nbytes + sum(window.mask.nbytes for window in windows if window.mask is not None)
        if self.ranks.device.type != "cpu":  # one bool per row and key, for `pattern` and for `last_pattern`
            size += (self.content_rows + 2 * self.predicted_rows) * self.content_rows
        return size

    @cached_property
    def pattern(self) -> Pattern:
        """What the content rows, then the query rows if there are any, attend to in all blocks but the last."""
        windows = (self.content_windows, self.predicted_windows) if self.queries else (self.content_windows,)
        return make_pattern(windows, self.content_rows, self.ranks.device, flex=self.flex)

    @cached_property
    def last_pattern(self) -> Pattern:
        """What the predicted rows attend to in the last block."""
        return make_pattern((self.predicted_windows,), self.content_rows, self.ranks.device, flex=self.flex)
