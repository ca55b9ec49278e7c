"""Floating-point operations of training a model, counted without computing anything."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...shared.runtime.compat import fake_tensors

ModelT = TypeVar("ModelT", bound=nn.Module)


def training_flops(build: Callable[[], ModelT], loss: Callable[[ModelT], Tensor]) -> int:
    """FLOPs of forward and backward, as `torch.utils.flop_counter` counts them.

    Args:
        build: makes the model; it is called under the meta device, so that no weights are drawn.
        loss: a scalar of the model, on uninitialised tensors that it makes on the CPU.
    """
    with torch.device("meta"):
        model = build()
    with fake_tensors(), FlopCounterMode(display=False) as counter:  # nothing is computed
        model.to_empty(device="cpu")
        torch.autograd.backward(loss(model))
    return int(counter.get_total_flops())
