"""MaPeT with dense masks, as its authors compute it: the yardstick of pretrain_step.py and gpu_check.py.

Raster order; a content stream of class token, all patches and auxiliary rows, a query stream of the predicted patches;
additive float masks for every image and head; softmax attention written out; every row through every block; logits of
all predicted patches at once. It takes the weights of our model as they are.
"""

import torch
from mapet.train_stage.model.mapet import LayerScale, MaPeT
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def build_masks(order: Tensor, visible: int, heads: int) -> tuple[Tensor, Tensor]:
    """Float masks, 0 or -inf, of one image: (heads, 1 + N + M, 1 + N + M) of content, (heads, M, 1 + N + M) of queries.

    order: (N,) int64. Predicted patches, and so auxiliary and query rows, lie in raster order.
    """
    patches = len(order)
    rank = torch.empty(patches, dtype=torch.int64)
    rank[order] = torch.arange(patches) - visible  # below 0: visible
    hidden = torch.nonzero(rank >= 0).flatten()
    among = rank[hidden]

    def row_mask(of: Tensor, strictly: bool) -> Tensor:
        """Rows of predicted patches with these ranks -> which keys they see, (rows, 1 + N + M)."""
        earlier = (rank[None] < of[:, None]) if strictly else (rank[None] <= of[:, None])
        later = (among[None] >= of[:, None]) if strictly else (among[None] > of[:, None])
        return torch.cat([torch.ones(len(of), 1, dtype=torch.bool), earlier, later], dim=1)

    one = torch.ones(1, dtype=torch.bool)
    free = torch.cat([one, rank < 0, one.expand(len(hidden))])
    content = free.expand(1 + patches + len(hidden), -1).clone()
    content[1 + hidden] = row_mask(among, strictly=False)
    return tuple(_additive(seen, heads) for seen in (content, row_mask(among, strictly=True)))


def _additive(seen: Tensor, heads: int) -> Tensor:
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).repeat(heads, 1, 1)


class DenseMaPeT(nn.Module):
    """`forward` takes what a loader with masks would deliver and returns the mean cross-entropy."""

    def __init__(self, model: MaPeT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, hidden: Tensor, masks: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """hidden (B, M) int64: predicted patches, in raster order as targets (B, M); masks (B, heads, ...)."""
        model = self.model
        batch, dim = len(images), model.shape.dim
        patches = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
        content = torch.cat([model.cls_token.expand(batch, -1, -1), patches], dim=1) + model.pos_embed
        positions = model.pos_embed[:, 1:].expand(batch, -1, -1).gather(1, hidden[:, :, None].expand(-1, -1, dim))
        queries = model.mask_positional_token + positions
        content = torch.cat([content, queries], dim=1)
        for block in model.blocks:
            content, queries = _block(block, content, queries, *masks)
        logits = model.decoder(model.norm(queries))
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _block(block: nn.Module, content: Tensor, queries: Tensor, mask: Tensor, query_mask: Tensor) -> tuple:
    normed, normed_queries = block.norm1(content), block.norm1(queries)
    keys, values = (split_heads(part, block.attn.heads) for part in block.attn.kv(normed).chunk(2, dim=-1))
    content = content + _scale(block.ls1, _attention(block.attn, normed, keys, values, mask))
    queries = queries + _scale(block.ls1, _attention(block.attn, normed_queries, keys, values, query_mask))
    content = content + _scale(block.ls2, _mlp(block.mlp, block.norm2(content)))
    return content, queries + _scale(block.ls2, _mlp(block.mlp, block.norm2(queries)))


def split_heads(rows: Tensor, heads: int) -> Tensor:
    """(B, rows, heads * d) -> (B, heads, rows, d)."""
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention(attn: nn.Module, rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    queries = split_heads(attn.q(rows), attn.heads)
    weights = (queries @ keys.transpose(-2, -1)) * queries.shape[-1] ** -0.5 + mask
    return attn.proj((weights.softmax(dim=-1) @ values).transpose(1, 2).flatten(2))


def _scale(layer: LayerScale, rows: Tensor) -> Tensor:
    return rows * layer.gamma


def _mlp(mlp: nn.Module, rows: Tensor) -> Tensor:
    return mlp.fc2(mlp.act(mlp.fc1(rows)))
