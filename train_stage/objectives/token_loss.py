"""Head and cross-entropy in one, chunk by chunk, so that the logits of all rows never exist at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import Linear
from torch.nn.functional import linear

LossAndGradients = tuple[Tensor, Tensor, Tensor, Tensor]


def cross_entropy_and_grads(logits: Tensor, truth: Tensor, count: int) -> LossAndGradients:
    """What a chunk of logits (rows, K) adds to the loss of `count` rows, for `truth` (rows, 1) int64.

    Returns the sum of its cross-entropies, which rows were guessed right, and the gradients of the mean: of the logits,
    in their dtype, and of the bias, in float32.
    """
    log_p = logits.float().log_softmax(-1)
    right = log_p.argmax(1) == truth[:, 0]
    log_p_of_truth = log_p.gather(1, truth)
    p = log_p.exp_().div_(count)
    of_bias = p.sum(0).index_add_(0, truth[:, 0], p.new_full((len(p),), -1 / count))
    gradient = p.to(logits.dtype).scatter_(1, truth, log_p_of_truth.expm1().div_(count).to(logits.dtype))
    return -log_p_of_truth.sum(), right, gradient, of_bias


def token_loss(
    rows: Tensor,
    head: Linear,
    targets: Tensor,
    chunk: int | None = None,
    loss_and_grads: Callable[..., LossAndGradients] = cross_entropy_and_grads,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of a head on rows (..., dim), targets (...) int64, and which were guessed right, bool (...).

    At most `chunk` rows have logits at any time; None gives all rows theirs at once. Exact: gradients are computed
    chunk by chunk in the forward pass and scaled in the backward pass. `loss_and_grads` is
    `cross_entropy_and_grads`, or that compiled.
    """
    flat = rows.flatten(0, -2)
    loss, right = _ChunkedLoss.apply(
        flat, head.weight, head.bias, targets.flatten(), chunk or len(flat), loss_and_grads
    )
    return loss, right.view(targets.shape)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        chunk: int,
        loss_and_grads: Callable,
    ) -> tuple[Tensor, Tensor]:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        of_rows, of_weight, of_bias = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros_like(bias)
        loss, right = rows.new_zeros((), dtype=torch.float32), torch.empty_like(targets, dtype=torch.bool)
        with torch.autocast(device, enabled=False):
            lowered, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
            for low in range(0, len(rows), chunk):
                some, part = slice(low, low + chunk), lowered[low : low + chunk]
                logits, truth = linear(part, weight, bias), targets[some, None]
                missed, right[some], gradient, more_of_bias = loss_and_grads(logits, truth, len(rows))
                loss += missed
                of_bias += more_of_bias
                of_rows[some] = gradient @ weight
                of_weight += gradient.T @ part
        ctx.save_for_backward(of_rows, of_weight, of_bias)
        ctx.mark_non_differentiable(right)
        return loss / len(rows), right

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, scale: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        of_rows, of_weight, of_bias = ctx.saved_tensors
        return of_rows * scale, of_weight * scale, of_bias * scale, None, None, None
