"""Fused attention in which each row sees one unbroken range of keys, its window."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import scaled_dot_product_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, eq=False)
class Window:
    """`rows` attend to `keys`: to all of them, or where `mask`, bool (rows, keys), is True."""

    rows: slice
    keys: slice
    mask: Tensor | None = None


def attend(
    streams: Sequence[Tensor], keys_values: Tensor, heads: int, windows: Sequence[Sequence[Window]]
) -> list[Tensor]:
    """Multi-head attention of streams of queries (B, rows, dim) to one set of keys and values (B, keys, 2 dim).

    `windows` has the windows of each stream; their rows follow one another and cover all of its rows. Returns what
    each stream's rows take, (B, rows, dim).
    """
    streams, keys_values = [_by_head(queries, heads) for queries in streams], _by_head(keys_values, 2 * heads)
    if keys_values.device.type == "cpu":
        joined = _OnCpu.apply(windows, keys_values, *streams)
    else:
        joined = [_plain(*pair, keys_values) for pair in zip(streams, windows, strict=True)]
    return [rows.transpose(1, 2).flatten(2) for rows in joined]


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """(B, rows, heads * d) -> (B, heads, rows, d), a view."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def _plain(queries: Tensor, windows: Sequence[Window], keys_values: Tensor) -> Tensor:
    keys, values = keys_values.chunk(2, dim=1)
    parts = [
        scaled_dot_product_attention(
            queries[:, :, window.rows], keys[:, :, window.keys], values[:, :, window.keys], attn_mask=window.mask
        )
        for window in windows
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _OnCpu(torch.autograd.Function):
    """SDPA's fused CPU kernel, window by window into one output, and back into one gradient of keys and values.

    Autograd would make a gradient of all keys for every window, and keep the output twice. The kernel gets float32
    whatever the inputs are, because its bfloat16 backward takes 2 to 3 times as long (benchmarks/pretrain_step.py).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, windows: Sequence[Sequence[Window]], keys_values: Tensor, *streams: Tensor
    ) -> tuple[Tensor, ...]:
        keys, values = keys_values.float().chunk(2, dim=1)
        outputs, log_sums = [], []
        for queries, some in zip(streams, windows, strict=True):
            q, output = queries.float(), _joined(queries)
            for window in some:
                rows, seen = window.rows, window.keys
                output[:, :, rows], log_sum = _flash(
                    q[:, :, rows], keys[:, :, seen], values[:, :, seen], attn_mask=_additive(window.mask)
                )
                log_sums.append(log_sum)
            outputs.append(output.to(queries.dtype))
        ctx.windows = windows
        ctx.save_for_backward(keys_values, *streams, *outputs, *log_sums)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        keys_values, *saved = ctx.saved_tensors
        count = len(ctx.windows)
        streams, outputs, log_sums = saved[:count], saved[count : 2 * count], iter(saved[2 * count :])
        keys, values = keys_values.float().chunk(2, dim=1)
        of_keys_values = _joined(keys_values).zero_()
        of_keys, of_values = of_keys_values.chunk(2, dim=1)
        of_streams = []
        for queries, output, gradient, some in zip(streams, outputs, gradients, ctx.windows, strict=True):
            q, out, g, of_queries = queries.float(), output.float(), gradient.float(), _joined(queries)
            for window in some:
                rows, seen = window.rows, window.keys
                of_queries[:, :, rows], some_keys, some_values = _flash_backward(
                    g[:, :, rows],
                    q[:, :, rows],
                    keys[:, :, seen],
                    values[:, :, seen],
                    out[:, :, rows],
                    next(log_sums),
                    0.0,
                    False,
                    attn_mask=_additive(window.mask),
                )
                of_keys[:, :, seen] += some_keys
                of_values[:, :, seen] += some_values
            of_streams.append(of_queries.to(queries.dtype))
        return None, of_keys_values.to(keys_values.dtype), *of_streams


def _joined(like: Tensor) -> Tensor:
    """Unfilled float32 (B, heads, rows, d) with the heads side by side in memory, so that joining them is free."""
    batch, heads, rows, d = like.shape
    return torch.empty(batch, rows, heads, d).transpose(1, 2)


def _additive(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
