"""The model of the attentive probe: a learned query attends to the patches, and a linear classifier follows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

HEAD_DIM = 64
"""Channels of an attention head."""


def attention_heads(dim: int) -> int:
    """How many heads features of `dim` channels get: heads of 64 channels; if 64 does not divide `dim`, as many larger
    ones as divide it."""
    most = max(1, dim // HEAD_DIM)
    return next(heads for heads in range(most, 0, -1) if dim % heads == 0)


class AttentiveHead(nn.Module):
    """The classifier of the attentive probe, as published with CAPI (arXiv 2502.08769).

    Its key has no bias: that would add the same number to the attention of all patches of an image, and cancel.
    """

    def __init__(self, dim: int, classes: int, seed: int):
        """Weights from a normal distribution of deviation 0.02, truncated, and biases of zero."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        heads = attention_heads(dim)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02, generator=generator))

        self.query = drawn(heads, dim // heads)
        self.key = drawn(heads, dim // heads, dim)
        self.value = drawn(heads, dim // heads, dim)
        self.value_bias = nn.Parameter(torch.zeros(dim))
        self.weight = drawn(classes, dim)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, patches: Tensor) -> Tensor:
        """Logits (B, classes) of patch features (B, N, dim)."""
        return grid_logits([self], patches)[0]


def grid_logits(grid: Sequence[AttentiveHead], patches: Tensor) -> Tensor:
    """The logits (G, B, classes) that each of G heads gives for patch features (B, N, dim), computed together.

    One query serves all images, so keys and values of single patches are never needed: q . (K x) = (K^T q) . x, and the
    average of V x is V applied to the average of x.
    """
    query, key, value, value_bias, weight, bias = (
        torch.stack([getattr(head, name) for head in grid])
        for name in ("query", "key", "value", "value_bias", "weight", "bias")
    )
    count, heads, channels = query.shape
    directions = torch.einsum("ghc,ghcd->ghd", query, key) / channels**0.5
    attention = (patches @ directions.flatten(0, 1).T).softmax(1)  # (B, N, G x heads)
    averages = (attention.mT @ patches).unflatten(1, (count, heads))
    attended = torch.einsum("bghd,ghcd->gbhc", averages, value).flatten(2) + value_bias[:, None]
    return attended @ weight.mT + bias[:, None]
