"""The head and the cross-entropy together, chunk by chunk, so that the logits of all rows never exist at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import Linear
from torch.nn.functional import linear

LossAndGradients = tuple[Tensor, Tensor, Tensor, Tensor]


def cross_entropy_and_grads(logits: Tensor, truth: Tensor, count: int) -> LossAndGradients:
    """The part of a chunk of rows in the mean cross-entropy of `count` rows.

    Args:
        logits: (rows, K) float.
        truth: (rows, 1) int64, the true tokens.
        count: the number of rows over which the mean is taken.

    Returns:
        The sum of the chunk's cross-entropies, float32; which rows are predicted correctly, (rows,) bool; the gradient
        of the mean with respect to the logits, in their dtype; and with respect to the head's bias, float32.
    """
    log_p = logits.float().log_softmax(-1)
    correct = log_p.argmax(1) == truth[:, 0]
    log_p_of_truth = log_p.gather(1, truth)
    p = log_p.exp_().div_(count)
    bias_gradient = p.sum(0).index_add_(0, truth[:, 0], p.new_full((len(p),), -1 / count))
    gradient = p.to(logits.dtype).scatter_(1, truth, log_p_of_truth.expm1().div_(count).to(logits.dtype))
    return -log_p_of_truth.sum(), correct, gradient, bias_gradient


def token_loss(
    rows: Tensor,
    head: Linear,
    targets: Tensor,
    chunk: int | None = None,
    loss_and_grads: Callable[..., LossAndGradients] = cross_entropy_and_grads,
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of a linear head, with at most `chunk` rows of logits in memory.

    Exact: gradients are computed chunk by chunk in the forward pass and scaled in the backward pass.

    Args:
        rows: (..., dim) float, the head's input.
        head: Linear(dim -> K).
        targets: (...) int64, the true tokens.
        chunk: how many rows have logits at a time; None is all of them.
        loss_and_grads: `cross_entropy_and_grads`, or that compiled.

    Returns:
        The loss, a float32 scalar in nats, and which rows are predicted correctly, (...) bool.
    """
    flat = rows.flatten(0, -2)
    loss, correct = _ChunkedLoss.apply(
        flat, head.weight, head.bias, targets.flatten(), chunk or len(flat), loss_and_grads
    )
    return loss, correct.view(targets.shape)


class _Context(FunctionCtx):
    """What the forward pass keeps for the backward pass."""

    saved_tensors: tuple[Tensor, ...]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        chunk: int,
        loss_and_grads: Callable[..., LossAndGradients],
    ) -> tuple[Tensor, Tensor]:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        row_grads, weight_grad, bias_grad = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros_like(bias)
        loss, correct = rows.new_zeros((), dtype=torch.float32), torch.empty_like(targets, dtype=torch.bool)
        with torch.autocast(device, enabled=False):
            lowered, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
            for low in range(0, len(rows), chunk):
                here, part = slice(low, low + chunk), lowered[low : low + chunk]
                logits, truth = linear(part, weight, bias), targets[here, None]
                part_loss, correct[here], logit_grads, part_bias_grad = loss_and_grads(logits, truth, len(rows))
                loss += part_loss
                bias_grad += part_bias_grad
                row_grads[here] = logit_grads @ weight
                weight_grad += logit_grads.T @ part
        ctx.save_for_backward(row_grads, weight_grad, bias_grad)
        ctx.mark_non_differentiable(correct)
        return loss / len(rows), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, scale: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        row_grads, weight_grad, bias_grad = ctx.saved_tensors
        return row_grads * scale, weight_grad * scale, bias_grad * scale, None, None, None
