"""Attention in windows by PyTorch's FlexAttention, a kernel that is generated for the pattern and keeps no mask of rows
and keys. It is imported only when it is chosen, because its import takes half a second."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .attention import Window


def make_block_mask(windows: Sequence[Sequence[Window]], keys: int, device: torch.device | str) -> BlockMask:
    """Which of a number of `keys` the rows of all streams attend to: in every row one unbroken range, which the kernel
    reads as two numbers."""
    firsts, lasts = (
        torch.cat(bounds) for bounds in zip(*(_ranges(w, device) for stream in windows for w in stream), strict=True)
    )

    def attends(_image: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= firsts[row]) & (key < lasts[row])

    return create_block_mask(attends, None, None, len(firsts), keys, device=device)


def _ranges(window: Window, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The first key of each row of a window and the one behind its last, int32 (rows,)."""
    keys = window.keys
    if window.mask is None:
        same = torch.ones(window.rows.stop - window.rows.start, dtype=torch.int32, device=device)
        return same * keys.start, same * keys.stop
    mask = window.mask.int()
    firsts = keys.start + mask.argmax(1)
    return firsts.int(), (firsts + mask.sum(1)).int()


def flex_attend(queries: Tensor, keys: Tensor, values: Tensor, blocks: BlockMask) -> Tensor:
    """Attention of queries (B, heads, rows, d) to keys and values (B, heads, keys, d): (B, heads, rows, d)."""
    compiled = flex_attention if torch.compiler.is_compiling() else _compiled()
    attended: Tensor = compiled(queries, keys, values, block_mask=blocks)
    return attended


@cache
def _compiled() -> Any:  # torch.compile keeps no signature
    """Without the compiler, FlexAttention would make the scores of all rows and keys."""
    return torch.compile(flex_attention)
