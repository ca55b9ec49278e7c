"""MaPeT: a Vision Transformer with a content stream and a query stream that share every weight (arXiv 2306.07346).

Rows are kept in permutation order, so that one constant `Layout` says for all images, heads and blocks which rows
attend to which; `objectives.layouts` makes it. Parameters carry the names of the published checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pixel_unshuffle
from torch.utils.checkpoint import checkpoint

from ...shared.errors import UsageError
from .attention import Pattern, Window, attend
from .layout import Layout
from .shape import Shape

_LAYER_SCALE = 0.1
NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Images (B, 3, S, S) -> patch embeddings (B, N, dim), in raster order or in the `order` (B, N) of each image."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, order: Tensor | None = None) -> Tensor:
        patches = pixel_unshuffle(images, self.proj.kernel_size[0]).flatten(2).transpose(1, 2)
        if order is not None:  # sorting pixels costs no backward pass, sorting embeddings would
            patches = patches.gather(1, order[:, :, None].expand_as(patches))
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """The weights of multi-head attention; q is apart from kv, as in the published checkpoints."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)


class LayerScale(nn.Module):
    """A learned factor per channel of a branch."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), _LAYER_SCALE))

    def folded(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of gamma * layer(rows). Scaling the rows instead would keep them for the backward pass."""
        return layer.weight * self.gamma[:, None], layer.bias * self.gamma


class Mlp(nn.Module):
    """The layers of a block's MLP; `Block` applies them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """A pre-norm ViT block with LayerScale, shared by both streams."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.dim, eps=NORM_EPS)
        self.attn = Attention(shape.dim, shape.heads)
        self.ls1 = LayerScale(shape.dim)
        self.norm2 = nn.LayerNorm(shape.dim, eps=NORM_EPS)
        self.mlp = Mlp(shape.dim, int(shape.dim * shape.mlp_ratio))
        self.ls2 = LayerScale(shape.dim)

    def forward(
        self,
        content: Tensor,
        streams: Sequence[Tensor],
        pattern: Pattern,
        drop_path_scale: Tensor | None = None,
    ) -> list[Tensor]:
        """Updates the rows of each stream; keys and values come from the content rows.

        Args:
            content: (B, rows, dim) float; if it is one of the streams, the first.
            streams: (B, rows, dim) float each, the rows to update.
            pattern: the content rows that the rows of the streams attend to.
            drop_path_scale: (B, 2) float, the factors of each image's attention and MLP branch (0 where dropped).

        Returns:
            The streams' rows after the block, (B, rows, dim) each.
        """
        attn, mlp = self.attn, self.mlp
        normed = _lowered(self.norm1(content))
        queries = [attn.q(normed if rows is content else _lowered(self.norm1(rows))) for rows in streams]
        attended = attend(queries, attn.kv(normed), attn.heads, pattern)
        project, shrink = self.ls1.folded(attn.proj), self.ls2.folded(mlp.fc2)
        updated = []
        for rows, values in zip(streams, attended, strict=True):
            rows = _add(rows, linear(values, *project), drop_path_scale, 0)
            hidden = mlp.act(mlp.fc1(_lowered(self.norm2(rows))))
            updated.append(_add(rows, linear(hidden, *shrink), drop_path_scale, 1))
        return updated


def _lowered(rows: Tensor) -> Tensor:
    """The rows in autocast's dtype. Autocast would cast them, and keep the copy, for every layer that reads them."""
    device = rows.device.type
    return rows.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else rows


def _add(rows: Tensor, branch: Tensor, drop_path_scale: Tensor | None, column: int) -> Tensor:
    """Rows + branch, the branch scaled by the `column` of `drop_path_scale`."""
    return rows + (branch if drop_path_scale is None else branch * drop_path_scale[:, column, None, None])


def draw_linear_layers(model: nn.Module) -> None:
    """Draws the initial values of all linear layers of a model."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def refuse_other_size(images: Tensor, shape: Shape) -> None:
    """Raises UsageError unless `images` are (B, 3, S, S) of the model's size."""
    size = shape.image_size
    if images.shape[1:] != (3, size, size):
        raise UsageError(f"images have shape {tuple(images.shape)}; this model takes (B, 3, {size}, {size}).")


def plain_rows(patches: Tensor, cls_token: Tensor, pos_embed: Tensor) -> tuple[Tensor, Pattern]:
    """The rows of a plain ViT before its first block, (B, 1 + N, dim) with the class token first, each of which attends
    to all; from embedded patches (B, N, dim)."""
    rows = torch.cat([cls_token.expand(len(patches), -1, -1), patches], dim=1) + pos_embed
    every = slice(0, rows.shape[1])
    return rows, Pattern([[Window(every, every)]])


class MaPeT(nn.Module):
    """The model. `forward` predicts tokens; `encode` is the plain ViT that is used after pre-training."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbed(shape.patch_size, shape.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.patches, shape.dim))
        self.mask_positional_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.dim, eps=NORM_EPS)
        self.decoder = nn.Linear(shape.dim, shape.k)
        self.grad_checkpointing = False
        """Whether the backward pass computes each block again instead of keeping its activations."""
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.mask_positional_token, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        draw_linear_layers(self)

    def forward(self, images: Tensor, order: Tensor, layout: Layout, drop_path_scale: Tensor | None = None) -> Tensor:
        """Logits (B, P, K) of the tokens of the patches at `layout.ranks`. Arguments and errors: see `predict_rows`."""
        logits: Tensor = self.decoder(self.predict_rows(images, order, layout, drop_path_scale))
        return logits

    def predict_rows(
        self, images: Tensor, order: Tensor, layout: Layout, drop_path_scale: Tensor | None = None
    ) -> Tensor:
        """The rows that the head reads: the predicted rows after the last block and the final norm.

        Args:
            images: (B, 3, S, S) float, normalised.
            order: (B, N) int64, for each image a permutation of its patches in raster order, visible ones first.
            layout: rows and attention, from `objectives.layouts.make_layout`.
            drop_path_scale: (B, depth, 2) float, drop path as in `Block`; None drops nothing.

        Returns:
            (B, P, dim) float, in the order of `layout.ranks`.

        Raises:
            UsageError if `images` or `order` do not fit the model.
        """
        self._check(images, order)
        streams = self._embed(images, order, layout)
        for index, block in enumerate(self.blocks):
            content, pattern = streams[0], layout.pattern
            if index == len(self.blocks) - 1:  # the head reads these rows only
                streams = streams[1:] if layout.queries else [content[:, 1 + layout.visible :]]
                pattern = layout.last_pattern
            arguments = (content, streams, pattern, None if drop_path_scale is None else drop_path_scale[:, index])
            streams = (
                checkpoint(block, *arguments, use_reentrant=False) if self.grad_checkpointing else block(*arguments)
            )
        rows: Tensor = self.norm(streams[0])
        return rows

    def _check(self, images: Tensor, order: Tensor) -> None:
        patches = self.shape.patches
        refuse_other_size(images, self.shape)
        if order.shape != (len(images), patches):
            raise UsageError(f"order has shape {tuple(order.shape)}; this model takes ({len(images)}, {patches}).")

    def _embed(self, images: Tensor, order: Tensor, layout: Layout) -> list[Tensor]:
        """The content rows and, if the layout has them, the query rows at the start: (B, rows, dim) each."""
        visible = layout.visible
        positions = embedding(order, self.pos_embed[0, 1:])
        patches = self.patch_embed(images, order) + positions
        masked = self.mask_positional_token + positions[:, visible:]
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        parts = [class_token, patches] if layout.patches else [class_token, patches[:, :visible], masked]
        content = torch.cat([masked, *parts] if layout.auxiliary else parts, dim=1)
        return [content, masked[:, layout.ranks]] if layout.queries else [content]

    def encode(self, images: Tensor) -> Tensor:
        """The plain ViT: images (B, 3, S, S) float -> rows after the last block (B, 1 + N, dim), class token first.

        The final norm is not applied.
        """
        rows, pattern = plain_rows(self.patch_embed(images), self.cls_token, self.pos_embed)
        for block in self.blocks:
            (rows,) = block(rows, [rows], pattern)
        return rows

    def features(self, images: Tensor) -> Tensor:
        """One vector per image: the mean over patches of the final norm's output, (B, dim)."""
        patches: Tensor = self.norm(self.encode(images)[:, 1:])
        return patches.mean(dim=1)


def drop_path_rates(depth: int, rate: float) -> Tensor:
    """(depth,) float: the drop rate of each block, from 0 linearly to `rate` (as timm does)."""
    return torch.linspace(0, rate, depth)


def drop_path_scales(uniform_draws: Tensor, rate: float) -> Tensor | None:
    """The `drop_path_scale` of `MaPeT.forward`, (B, depth, 2) float; None if `rate` is 0.

    Args:
        uniform_draws: (B, depth, 2) float in [0, 1).
        rate: the drop rate of the last block.
    """
    if rate == 0:
        return None
    survive = 1 - drop_path_rates(uniform_draws.shape[1], rate).to(uniform_draws)[None, :, None]
    return (uniform_draws < survive).to(uniform_draws) / survive
