"""Head and cross-entropy in one, chunk by chunk, so that the logits of all rows never exist at once."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import Linear
from torch.nn.functional import linear


def token_loss(rows: Tensor, head: Linear, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of a head on rows (..., dim), targets (...) int64, and which were guessed right, bool (...).

    At most `chunk` rows have logits at any time; None gives all rows theirs at once. Exact: gradients are computed
    chunk by chunk in the forward pass and scaled in the backward pass.
    """
    flat = rows.flatten(0, -2)
    loss, right = _ChunkedLoss.apply(flat, head.weight, head.bias, targets.flatten(), chunk or len(flat))
    return loss, right.view(targets.shape)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        of_rows, of_weight, of_bias = torch.empty_like(rows), torch.zeros_like(weight), torch.zeros_like(bias)
        loss, right = rows.new_zeros((), dtype=torch.float32), torch.empty_like(targets, dtype=torch.bool)
        with torch.autocast(device, enabled=False):
            lowered, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
            for low in range(0, len(rows), chunk):
                part, truth = lowered[low : low + chunk], targets[low : low + chunk, None]
                log_p = linear(part, weight, bias).float().log_softmax(-1)
                loss -= log_p.gather(1, truth).sum()
                right[low : low + chunk] = log_p.argmax(1) == truth[:, 0]
                gradient = log_p.exp_().scatter_add_(1, truth, torch.full_like(truth, -1, dtype=log_p.dtype))
                gradient = gradient.div_(len(rows))
                of_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                of_rows[low : low + chunk] = gradient @ weight
                of_weight += gradient.T @ part
        ctx.save_for_backward(of_rows, of_weight, of_bias)
        ctx.mark_non_differentiable(right)
        return loss / len(rows), right

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, scale: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        of_rows, of_weight, of_bias = ctx.saved_tensors
        return of_rows * scale, of_weight * scale, of_bias * scale, None, None
