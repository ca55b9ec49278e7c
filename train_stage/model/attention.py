"""Fused attention in which every row attends to one unbroken range of keys, its window.

The CPU computes it window by window, other devices under one mask or by FlexAttention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from ...shared.runtime.compat import flash_attention, flash_attention_backward

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_BY_WINDOWS = ("cpu",)
"""Devices on which slices of rows are cheaper than a mask over all keys; on an H200 one masked call takes half the time
(benchmarks/gpu_check.py)."""


@dataclass(frozen=True, eq=False)
class Window:
    """A slice of a stream's rows and the slice of the keys that they attend to."""

    rows: slice
    keys: slice
    mask: Tensor | None = None
    """bool (rows, keys), True where a row attends to a key; None if every row attends to all of `keys`."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """The keys that the rows of one or more streams attend to, in the form that their device computes fastest."""

    windows: Sequence[Sequence[Window]]
    """The windows of each stream; their rows follow one another and cover all of its rows."""
    mask: Tensor | None = None
    """The same as bool (rows of all streams, keys), on devices other than the CPU; None if every row attends to every
    key, or if there are `blocks`."""
    blocks: "BlockMask | None" = None
    """The same for FlexAttention, if that was chosen."""


def make_pattern(
    windows: Sequence[Sequence[Window]], keys: int, device: torch.device | str, *, flex: bool = False
) -> Pattern:
    """The pattern of each stream's windows, for streams on `device` that attend to a number of `keys`; with `flex` for
    FlexAttention, unless every row attends to every key."""
    every = slice(0, keys)
    unmasked = all(window.mask is None and window.keys == every for stream in windows for window in stream)
    if flex and not unmasked:
        from .flex import make_block_mask

        return Pattern(windows, blocks=make_block_mask(windows, keys, device))
    if unmasked or torch.device(device).type in _BY_WINDOWS:
        return Pattern(windows)
    masks = []
    for stream in windows:
        mask = torch.zeros(stream[-1].rows.stop, keys, dtype=torch.bool, device=device)
        for window in stream:
            mask[window.rows, window.keys] = True if window.mask is None else window.mask
        masks.append(mask)
    return Pattern(windows, torch.cat(masks))


def attend(streams: Sequence[Tensor], keys_values: Tensor, heads: int, pattern: Pattern) -> list[Tensor]:
    """Multi-head attention of streams of queries to one set of keys and values.

    Args:
        streams: the queries of each stream, (B, rows, dim).
        keys_values: the keys, then the values, of all heads: (B, keys, 2 * dim).
        heads: the number of heads; they divide `dim`.
        pattern: the keys that each row attends to.

    Returns:
        For each stream, the sums of values that its rows attend to, (B, rows, dim), heads side by side.
    """
    keys_values = _by_head(keys_values, 2 * heads)
    if pattern.blocks is None and keys_values.device.type in _BY_WINDOWS:
        outputs = _OnCpu.apply(pattern.windows, keys_values, *(_by_head(queries, heads) for queries in streams))
        return [rows.transpose(1, 2).flatten(2) for rows in outputs]
    keys, values = keys_values.chunk(2, dim=1)
    # One call for all streams: keys and values are read once, and have one gradient instead of a sum of several.
    queries = _by_head(torch.cat(list(streams), dim=1), heads)
    if pattern.blocks is None:
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=pattern.mask)
    else:
        from .flex import flex_attend

        attended = flex_attend(queries, keys, values, pattern.blocks)
    joined = attended.transpose(1, 2).flatten(2)
    return list(torch.split(joined, [stream.shape[1] for stream in streams], dim=1))


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """(B, rows, heads * d) -> (B, heads, rows, d), a view."""
    return rows.view(*rows.shape[:-1], heads, rows.shape[-1] // heads).transpose(1, 2)


class _Context(FunctionCtx):
    """What the forward pass keeps for the backward pass."""

    bounds: list[int]
    masks: list[Tensor | None]
    counts: list[int]
    saved_tensors: tuple[Tensor, ...]


class _OnCpu(torch.autograd.Function):
    """SDPA's fused CPU kernel, window by window: one output, and one gradient of the keys and values.

    Autograd would make a gradient of all keys for every window and keep the output twice. The kernel gets float32
    whatever the dtype of the inputs, because its bfloat16 backward takes 2 to 3 times as long
    (benchmarks/pretrain_step.py).
    """

    @staticmethod
    def forward(
        ctx: _Context, windows: Sequence[Sequence[Window]], keys_values: Tensor, *streams: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.bounds = [bound for stream in windows for window in stream for bound in _bounds(window)]
        ctx.masks = [window.mask for stream in windows for window in stream]
        ctx.counts = [len(stream) for stream in windows]
        outputs = _attend_on_cpu(keys_values, streams, ctx.counts, ctx.bounds, ctx.masks)
        ctx.save_for_backward(keys_values, *streams, *outputs)
        return tuple(outputs[: len(streams)])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        keys_values, *saved = ctx.saved_tensors
        count = len(gradients)
        streams, outputs, log_sums = saved[:count], saved[count : 2 * count], saved[2 * count :]
        return None, *_attend_on_cpu_backward(
            keys_values, streams, outputs, log_sums, gradients, ctx.counts, ctx.bounds, ctx.masks
        )


def _bounds(window: Window) -> tuple[int, int, int, int]:
    return window.rows.start, window.rows.stop, window.keys.start, window.keys.stop


def _slices(
    counts: Sequence[int], bounds: Sequence[int], masks: Sequence[Tensor | None]
) -> Iterator[tuple[int, slice, slice, Tensor | None]]:
    """(number of the stream, rows, keys, additive mask) of every window."""
    streams = [stream for stream, count in enumerate(counts) for _ in range(count)]
    for index, (stream, mask) in enumerate(zip(streams, masks, strict=True)):
        top, bottom, first, last = bounds[4 * index : 4 * index + 4]
        additive = None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        yield stream, slice(top, bottom), slice(first, last), additive


# Custom operators, because torch.compile would turn writes into slices into copies of the whole.
@torch.library.custom_op(
    "mapet::attend_on_cpu",
    mutates_args=(),
    schema="(Tensor keys_values, Tensor[] streams, int[] counts, int[] bounds, Tensor?[] masks) -> Tensor[]",
)
def _attend_on_cpu(
    keys_values: Tensor,
    streams: Sequence[Tensor],
    counts: Sequence[int],
    bounds: Sequence[int],
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    """The output of each stream, then the log-sum-exp of each stream's rows, float32 (B, heads, rows)."""
    keys, values = keys_values.float().chunk(2, dim=1)
    queries = [stream.float() for stream in streams]
    outputs, log_sums = [_empty_by_head(q) for q in queries], [q.new_empty(q.shape[:3]) for q in queries]
    for stream, rows, window, mask in _slices(counts, bounds, masks):
        outputs[stream][:, :, rows], log_sums[stream][:, :, rows] = flash_attention(
            queries[stream][:, :, rows], keys[:, :, window], values[:, :, window], attn_mask=mask
        )
    return [output.to(stream.dtype) for output, stream in zip(outputs, streams, strict=True)] + log_sums


@_attend_on_cpu.register_fake
def _(
    keys_values: Tensor,
    streams: Sequence[Tensor],
    counts: Sequence[int],
    bounds: Sequence[int],
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    return [_empty_by_head(stream, stream.dtype) for stream in streams] + [
        stream.new_empty(stream.shape[:3], dtype=torch.float32) for stream in streams
    ]


@torch.library.custom_op(
    "mapet::attend_on_cpu_backward",
    mutates_args=(),
    schema="(Tensor keys_values, Tensor[] streams, Tensor[] outputs, Tensor[] log_sums, Tensor[] gradients, "
    "int[] counts, int[] bounds, Tensor?[] masks) -> Tensor[]",
)
def _attend_on_cpu_backward(
    keys_values: Tensor,
    streams: Sequence[Tensor],
    outputs: Sequence[Tensor],
    log_sums: Sequence[Tensor],
    gradients: Sequence[Tensor],
    counts: Sequence[int],
    bounds: Sequence[int],
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    """The gradient of the keys and values, then that of each stream."""
    keys, values = keys_values.float().chunk(2, dim=1)
    queries, outputs, gradients = ([part.float() for part in parts] for parts in (streams, outputs, gradients))
    query_gradients, joined = [_empty_by_head(q) for q in queries], _empty_by_head(keys_values).zero_()
    key_gradients, value_gradients = joined.chunk(2, dim=1)
    for stream, rows, window, mask in _slices(counts, bounds, masks):
        query_gradients[stream][:, :, rows], of_keys, of_values = flash_attention_backward(
            gradients[stream][:, :, rows],
            queries[stream][:, :, rows],
            keys[:, :, window],
            values[:, :, window],
            outputs[stream][:, :, rows],
            log_sums[stream][:, :, rows],
            0.0,
            False,
            attn_mask=mask,
        )
        key_gradients[:, :, window] += of_keys
        value_gradients[:, :, window] += of_values
    return [joined.to(keys_values.dtype)] + [
        gradient.to(stream.dtype) for gradient, stream in zip(query_gradients, streams, strict=True)
    ]


@_attend_on_cpu_backward.register_fake
def _(
    keys_values: Tensor,
    streams: Sequence[Tensor],
    outputs: Sequence[Tensor],
    log_sums: Sequence[Tensor],
    gradients: Sequence[Tensor],
    counts: Sequence[int],
    bounds: Sequence[int],
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    return [_empty_by_head(tensor, tensor.dtype) for tensor in (keys_values, *streams)]


def _empty_by_head(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unfilled (B, heads, rows, d) with the heads side by side in memory, so that joining them is free."""
    batch, heads, rows, d = like.shape
    return like.new_empty(batch, rows, heads, d, dtype=dtype).transpose(1, 2)


@register_flop_formula(torch.ops.mapet.attend_on_cpu)
def _attention_flops(
    keys_values: Sequence[int], streams: Any, counts: Any, bounds: Sequence[int], masks: Any, **_: Any
) -> int:
    """The counter's own formula of SDPA for each window: two products of rows x keys x d. Tensors come as shapes."""
    images, doubled_heads, _keys, d = keys_values
    windows = zip(*(iter(bounds),) * 4, strict=True)
    pairs = sum((bottom - top) * (last - first) for top, bottom, first, last in windows)
    return 2 * 2 * pairs * d * images * doubled_heads // 2


@register_flop_formula(torch.ops.mapet.attend_on_cpu_backward)
def _attention_backward_flops(
    keys_values: Sequence[int],
    streams: Any,
    outputs: Any,
    log_sums: Any,
    gradients: Any,
    counts: Any,
    bounds: Sequence[int],
    masks: Any,
    **_: Any,
) -> int:
    """Five products, as the counter counts SDPA's backward pass (the scores are computed again)."""
    return int(_attention_flops(keys_values, streams, counts, bounds, masks)) * 5 // 2
