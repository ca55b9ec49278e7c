"""PyTorch's private functions, each with a public fallback: no other module of the package may touch them.

The private function is bound when this module is imported, so that a call costs nothing extra; where a release of
PyTorch lacks it, the public fallback of the same signature takes its name. Fallbacks are slower and agree to the
tolerance that they state.
"""

import json
import math
import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


def _private_operator(name: str) -> Callable[..., Any] | None:
    operator: Callable[..., Any] | None = getattr(torch.ops.aten, name, None)
    return operator


# Attention on the CPU


def public_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries (B, heads, rows, d) to keys and values (B, heads, keys, d).

    `attn_mask` is added to the scores. Returns the output (B, heads, rows, d) and the log-sum-exp of each row's scores
    (B, heads, rows), equal to the fused kernel's to 1e-5. Raises NotImplementedError for dropout and causal masks.
    """
    scores = _scores(query, key, dropout_p, is_causal, attn_mask, scale)
    log_sums = scores.logsumexp(-1)
    return (scores - log_sums[..., None]).exp() @ value, log_sums


def public_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from what `public_flash_attention` took and returned.

    Equal to the fused kernel's to 1e-5 (Dao et al. 2022, FlashAttention, appendix B.2).
    """
    weights = (_scores(query, key, dropout_p, is_causal, attn_mask, scale) - logsumexp[..., None]).exp()
    grad_weights = grad_out @ value.mT
    grad_scores = weights * (grad_weights - (grad_out * out).sum(-1, keepdim=True)) * _scale(query, scale)
    return grad_scores @ key, grad_scores.mT @ query, weights.mT @ grad_out


def _scores(
    query: Tensor, key: Tensor, dropout_p: float, is_causal: bool, attn_mask: Tensor | None, scale: float | None
) -> Tensor:
    if dropout_p or is_causal:
        raise NotImplementedError("The public fallback of CPU flash attention has neither dropout nor causal masks.")
    scores = query @ key.mT * _scale(query, scale)
    return scores if attn_mask is None else scores + attn_mask


def _scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


flash_attention: Callable[..., tuple[Tensor, Tensor]] = (
    _private_operator("_scaled_dot_product_flash_attention_for_cpu") or public_flash_attention
)
"""The fused kernel that scaled_dot_product_attention calls on the CPU."""
flash_attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
    _private_operator("_scaled_dot_product_flash_attention_for_cpu_backward") or public_flash_attention_backward
)
"""The kernel that autograd calls for it."""


# Antialiased resize


def public_resize_bicubic(
    pixels: Tensor, output_size: Sequence[int], align_corners: bool, scales_h: float, scales_w: float
) -> Tensor:
    """Resizes uint8 (B, C, height, width) to `output_size` (height, width) with Pillow's antialiased bicubic filter.

    `scales_h` and `scales_w` are output pixels per input pixel; they need not be the ratio of the sizes, so that a
    region of an image can be shown at a fraction of a pixel. Equal to the private operator's result, or within one
    grey level where `interpolate` cannot give that size at that scale. `align_corners` is not used by this filter.
    """
    return _public_resize(pixels, output_size, (scales_h, scales_w), "bicubic")


def public_resize_bilinear(
    pixels: Tensor, output_size: Sequence[int], align_corners: bool, scales_h: float, scales_w: float
) -> Tensor:
    """The same as `public_resize_bicubic` with the antialiased bilinear filter."""
    return _public_resize(pixels, output_size, (scales_h, scales_w), "bilinear")


def _public_resize(pixels: Tensor, size: Sequence[int], scales: tuple[float, float], mode: str) -> Tensor:
    inputs = pixels.shape[-2:]
    # `interpolate` derives the size from the scale; what lies below and right of the wanted pixels is cut off.
    if all(math.floor(length * scale) >= out for length, scale, out in zip(inputs, scales, size, strict=True)):
        resized = interpolate(
            pixels, scale_factor=scales, mode=mode, antialias=True, align_corners=False, recompute_scale_factor=False
        )
        return resized[..., : size[0], : size[1]]
    vertical, horizontal = (
        _filter_weights(length, out, scale, mode) for length, out, scale in zip(inputs, size, scales, strict=True)
    )
    # Rounded between the two passes, as the operator and Pillow do.
    narrowed = (pixels.to(torch.float64) @ horizontal.mT).round().clamp(0, 255)
    return (vertical @ narrowed).round().clamp(0, 255).to(torch.uint8)


def _filter_weights(length: int, out: int, scale: float, mode: str) -> Tensor:
    """float64 (out, length): how much of each input pixel each output pixel is."""
    step = 1 / scale  # input pixels per output pixel
    widening = max(step, 1.0)
    centres = (torch.arange(out, dtype=torch.float64) + 0.5) * step
    x = ((torch.arange(length) + 0.5) - centres[:, None]).abs() / widening
    if mode == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:  # Keys' cubic with a = -0.5, as Pillow's
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


resize_bicubic: Callable[..., Tensor] = _private_operator("_upsample_bicubic2d_aa") or public_resize_bicubic
resize_bilinear: Callable[..., Tensor] = _private_operator("_upsample_bilinear2d_aa") or public_resize_bilinear


# Worker processes of a DataLoader

_started_processes: "weakref.WeakKeyDictionary[Iterator[Any], list[BaseProcess]]" = weakref.WeakKeyDictionary()
"""For the fallback: the processes that began while an iterator was made."""


def start_workers(loader: "DataLoader[Any]") -> Iterator[Any]:
    """An iterator over the loader's batches, whose worker processes have been started."""
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    _started_processes[batches] = [child for child in multiprocessing.active_children() if child not in before]
    return batches


def worker_pids(batches: Iterator[Any]) -> list[int]:
    """The process ids of the workers behind an iterator that `start_workers` returned; empty without workers.

    The fallback takes all processes that this one started during `start_workers`.
    """
    workers: Sequence[BaseProcess] = getattr(batches, "_workers", _started_processes.get(batches, []))
    return [worker.pid for worker in workers if worker.pid is not None]


def shut_down_workers(batches: Iterator[Any]) -> None:
    """Ends the workers behind an iterator that `start_workers` returned, whatever signals they ignore.

    The fallback kills them, without letting them finish their batch.
    """
    shut_down: Callable[[], None] | None = getattr(batches, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
        return
    for worker in _started_processes.pop(batches, []):
        worker.kill()
        worker.join()


# Tensors without content, and the bytes that tensors hold


class _ZerosForEmpty(TorchFunctionMode):
    """Fills tensors that would be left unfilled, so that indexes among them are valid."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        if function is torch.empty:
            function = torch.zeros
        elif function is torch.empty_like:
            function = torch.zeros_like
        return function(*arguments, **(keywords or {}))


class BytesCounter(Protocol):
    """A context manager: after the block, `peak` is the most bytes that tensors made inside it held at a time."""

    peak: int

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> Any: ...


class PublicLiveBytes:
    """A `BytesCounter` of allocations on the CPU that PyTorch's profiler records, kernels' scratch memory included."""

    def __init__(self) -> None:
        self.peak = 0
        self._stack = ExitStack()

    def __enter__(self) -> "PublicLiveBytes":
        from torch.profiler import ProfilerActivity, profile

        self._profiler = self._stack.enter_context(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
            path = Path(folder, "trace.json")
            self._profiler.export_chrome_trace(os.fspath(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        live = 0
        for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
            live += event["args"]["Bytes"]
            self.peak = max(self.peak, live)


def public_fake_tensors() -> AbstractContextManager[Any]:
    """Within the block, tensors on the CPU have no content and operators compute only shapes.

    The fallback computes everything, with zeros for unfilled tensors: the same shapes and counts, in more time and
    memory.
    """
    return _ZerosForEmpty()


fake_tensors: Callable[[], AbstractContextManager[Any]] = public_fake_tensors
LiveBytes: Callable[[], BytesCounter] = PublicLiveBytes
try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    pass
else:

    def _fake_tensors() -> AbstractContextManager[Any]:
        return FakeTensorMode(allow_non_fake_inputs=True)

    class _DispatchedLiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call] # PyTorch's __init_subclass__
        """A `BytesCounter` of all storages that are alive, with or without content."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.now = self.peak = 0
            self._known: set[int] = set()

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, list | tuple) else (result,):
                if isinstance(tensor, Tensor):
                    self._add(tensor.untyped_storage())
            return result

        def _add(self, storage: torch.UntypedStorage) -> None:
            # PyTorch keeps one Python object per storage for as long as the storage lives.
            if id(storage) in self._known:
                return
            self._known.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, id(storage), storage.nbytes())

        def _drop(self, identity: int, count: int) -> None:
            self._known.discard(identity)
            self.now -= count

    fake_tensors, LiveBytes = _fake_tensors, _DispatchedLiveBytes
