"""Fused attention in which each row sees one unbroken range of keys, its window: by windows, or under one mask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from ...shared.runtime.compat import flash_attention, flash_attention_backward

_BY_WINDOWS = ("cpu",)
"""Where slices of rows are cheaper than a mask over all keys; on an H200 one masked call takes half of their time
(benchmarks/gpu_check.py)."""


@dataclass(frozen=True, eq=False)
class Window:
    """`rows` attend to `keys`: to all of them, or where `mask`, bool (rows, keys), is True."""

    rows: slice
    keys: slice
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Pattern:
    """What the rows of one or more streams attend to, in the form that their device computes fastest."""

    windows: Sequence[Sequence[Window]]
    """The windows of each stream; their rows follow one another and cover all of its rows."""
    mask: Tensor | None = None
    """Elsewhere than on the CPU: the same as bool (rows of all streams, keys); None if every row sees every key."""


def make_pattern(windows: Sequence[Sequence[Window]], keys: int, device: torch.device | str) -> Pattern:
    """The pattern of these windows, for streams on `device` that attend to so many keys."""
    unmasked = all(window.mask is None and window.keys == slice(0, keys) for some in windows for window in some)
    if unmasked or torch.device(device).type in _BY_WINDOWS:
        return Pattern(windows)
    seen = [torch.zeros(some[-1].rows.stop, keys, dtype=torch.bool, device=device) for some in windows]
    for stream, some in zip(seen, windows, strict=True):
        for window in some:
            stream[window.rows, window.keys] = True if window.mask is None else window.mask
    return Pattern(windows, torch.cat(seen))


def attend(streams: Sequence[Tensor], keys_values: Tensor, heads: int, pattern: Pattern) -> list[Tensor]:
    """Multi-head attention of streams of queries (B, rows, dim) to one set of keys and values (B, keys, 2 dim).

    Returns what each stream's rows take, (B, rows, dim).
    """
    keys_values = _by_head(keys_values, 2 * heads)
    if keys_values.device.type in _BY_WINDOWS:
        taken = _OnCpu.apply(pattern.windows, keys_values, *(_by_head(queries, heads) for queries in streams))
        return [rows.transpose(1, 2).flatten(2) for rows in taken]
    keys, values = keys_values.chunk(2, dim=1)
    # One call for all streams: keys and values are read once, and have one gradient instead of a sum of several.
    joined = _by_head(torch.cat(list(streams), dim=1), heads)
    taken = scaled_dot_product_attention(joined, keys, values, attn_mask=pattern.mask).transpose(1, 2).flatten(2)
    return list(taken.split([queries.shape[1] for queries in streams], dim=1))


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """(B, rows, heads * d) -> (B, heads, rows, d), a view."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


class _OnCpu(torch.autograd.Function):
    """SDPA's fused CPU kernel, window by window into one output, and back into one gradient of keys and values.

    Autograd would make a gradient of all keys for every window, and keep the output twice. The kernel gets float32
    whatever the inputs are, because its bfloat16 backward takes 2 to 3 times as long (benchmarks/pretrain_step.py).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, windows: Sequence[Sequence[Window]], keys_values: Tensor, *streams: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.bounds = [bound for some in windows for window in some for bound in _bounds(window)]
        ctx.masks = [window.mask for some in windows for window in some]
        ctx.counts = [len(some) for some in windows]
        outputs = _attend_on_cpu(keys_values, streams, ctx.counts, ctx.bounds, ctx.masks)
        ctx.save_for_backward(keys_values, *streams, *outputs)
        return tuple(outputs[: len(streams)])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        keys_values, *saved = ctx.saved_tensors
        count = len(gradients)
        streams, outputs, log_sums = saved[:count], saved[count : 2 * count], saved[2 * count :]
        return None, *_attend_on_cpu_backward(
            keys_values, streams, outputs, log_sums, gradients, ctx.counts, ctx.bounds, ctx.masks
        )


def _bounds(window: Window) -> tuple[int, int, int, int]:
    return window.rows.start, window.rows.stop, window.keys.start, window.keys.stop


def _slices(counts: Sequence[int], bounds: Sequence[int], masks: Sequence[Tensor | None]) -> Iterator[tuple]:
    """(stream, rows, keys, additive mask) of every window."""
    streams = [stream for stream, count in enumerate(counts) for _ in range(count)]
    for index, (stream, mask) in enumerate(zip(streams, masks, strict=True)):
        top, bottom, first, last = bounds[4 * index : 4 * index + 4]
        additive = None if mask is None else torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        yield stream, slice(top, bottom), slice(first, last), additive


# Operators of our own, because torch.compile would turn writes into slices into copies of the whole.
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
    """What each stream takes, then the log-sum-exp of each stream's rows, float32 (B, heads, rows)."""
    keys, values = keys_values.float().chunk(2, dim=1)
    queries = [stream.float() for stream in streams]
    outputs, log_sums = [_joined(q) for q in queries], [q.new_empty(q.shape[:3]) for q in queries]
    for stream, rows, seen, mask in _slices(counts, bounds, masks):
        outputs[stream][:, :, rows], log_sums[stream][:, :, rows] = flash_attention(
            queries[stream][:, :, rows], keys[:, :, seen], values[:, :, seen], attn_mask=mask
        )
    return [output.to(stream.dtype) for output, stream in zip(outputs, streams, strict=True)] + log_sums


@_attend_on_cpu.register_fake
def _(keys_values, streams, counts, bounds, masks):
    return [_joined(stream, stream.dtype) for stream in streams] + [
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
    """Gradients of keys and values, and of each stream."""
    keys, values = keys_values.float().chunk(2, dim=1)
    queries, outputs, gradients = ([part.float() for part in parts] for parts in (streams, outputs, gradients))
    of_keys_values, of_queries = _joined(keys_values).zero_(), [_joined(q) for q in queries]
    of_keys, of_values = of_keys_values.chunk(2, dim=1)
    for stream, rows, seen, mask in _slices(counts, bounds, masks):
        of_queries[stream][:, :, rows], some_keys, some_values = flash_attention_backward(
            gradients[stream][:, :, rows],
            queries[stream][:, :, rows],
            keys[:, :, seen],
            values[:, :, seen],
            outputs[stream][:, :, rows],
            log_sums[stream][:, :, rows],
            0.0,
            False,
            attn_mask=mask,
        )
        of_keys[:, :, seen] += some_keys
        of_values[:, :, seen] += some_values
    return [of_keys_values.to(keys_values.dtype)] + [
        gradient.to(stream.dtype) for gradient, stream in zip(of_queries, streams, strict=True)
    ]


@_attend_on_cpu_backward.register_fake
def _(keys_values, streams, outputs, log_sums, gradients, counts, bounds, masks):
    return [_joined(tensor, tensor.dtype) for tensor in (keys_values, *streams)]


def _joined(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unfilled (B, heads, rows, d) with the heads side by side in memory, so that joining them is free."""
    batch, heads, rows, d = like.shape
    return like.new_empty(batch, rows, heads, d, dtype=dtype).transpose(1, 2)


@register_flop_formula(torch.ops.mapet.attend_on_cpu)
def _attention_flops(keys_values, streams, counts, bounds, masks, out_shape=None, **_) -> int:
    """What the counter's own formula of SDPA gives for each window: two products of rows x keys x d."""
    images, doubled_heads, _, d = keys_values
    windows = zip(*(iter(bounds),) * 4, strict=True)
    pairs = sum((bottom - top) * (last - first) for top, bottom, first, last in windows)
    return 2 * 2 * pairs * d * images * doubled_heads // 2


@register_flop_formula(torch.ops.mapet.attend_on_cpu_backward)
def _attention_backward_flops(keys_values, streams, outputs, log_sums, gradients, counts, bounds, masks, **_) -> int:
    """Five products, as the counter counts SDPA's backward pass (the scores are computed again)."""
    return _attention_flops(keys_values, streams, counts, bounds, masks) * 5 // 2
