"""MaPeT: a Vision Transformer with a content stream and a query stream that share every weight (arXiv 2306.07346).

Rows are kept in permutation order, so that what may attend to what is one constant pattern for all images, heads and
steps (`attention_pattern`). Parameters carry the names of the published checkpoints.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..shared.errors import UsageError

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""(dim, depth, heads) of the model names `vit-tiny` ... `vit-large`."""

_LAYER_SCALE = 0.1
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """What a model's tensors look like. Sizes are in pixels; `k` is the number of codes that the head predicts."""

    dim: int
    depth: int
    heads: int
    patch_size: int
    image_size: int
    k: int
    mlp_ratio: float = 4.0

    def __post_init__(self):
        if self.dim % self.heads:
            raise UsageError(f"model.dim {self.dim} is no multiple of model.heads {self.heads}.")
        if self.image_size % self.patch_size:
            raise UsageError(
                f"model.image_size {self.image_size} is no multiple of model.patch_size {self.patch_size}."
            )

    @property
    def patches(self) -> int:
        """N, the number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def to_json(self) -> dict:
        return asdict(self)


def attention_pattern(given: int, predicted: int, device: torch.device | None = None) -> Tensor:
    """Which keys the rows of the predicted part attend to: bool (2M, V + 2M), True where attention is allowed.

    Rows are the content of patches of rank 1..M, then the queries of rank 1..M. Keys are the V = `given` rows (class
    token and visible patches), the M auxiliary rows by rank, the M patches by rank. Section 3 of the paper.
    """
    rank = torch.arange(predicted, device=device)
    row, key = rank[:, None], rank[None, :]
    everything = torch.ones(predicted, given, dtype=torch.bool, device=device)
    content = torch.cat([everything, key > row, key <= row], dim=1)
    query = torch.cat([everything, key >= row, key < row], dim=1)
    return torch.cat([content, query])


class PatchEmbed(nn.Module):
    """Pixels (B, 3, S, S) -> patch embeddings (B, N, dim) in raster order."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with q apart from kv, as in the published weights."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, rows: Tensor) -> Tensor:
        """(B, rows, dim) -> (B, heads, rows, dim / heads)."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def queries(self, rows: Tensor) -> Tensor:
        return self.split(self.q(rows))

    def keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.kv(rows).chunk(2, dim=-1)
        return self.split(keys), self.split(values)

    def join(self, attended: Tensor) -> Tensor:
        return self.proj(attended.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), _LAYER_SCALE))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, rows: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(rows)))


class Block(nn.Module):
    """A pre-norm ViT block with LayerScale.

    `keep` is None, or (B, 2) float: by how much each image's attention and MLP branch count (0 where dropped), the
    same for both streams.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.dim, eps=_NORM_EPS)
        self.attn = Attention(shape.dim, shape.heads)
        self.ls1 = LayerScale(shape.dim)
        self.norm2 = nn.LayerNorm(shape.dim, eps=_NORM_EPS)
        self.mlp = Mlp(shape.dim, int(shape.dim * shape.mlp_ratio))
        self.ls2 = LayerScale(shape.dim)

    def _residuals(self, rows: Tensor, attended: Tensor, keep: Tensor | None) -> Tensor:
        branch = self.ls1(self.attn.join(attended))
        rows = rows + (branch if keep is None else branch * keep[:, 0, None, None])
        branch = self.ls2(self.mlp(self.norm2(rows)))
        return rows + (branch if keep is None else branch * keep[:, 1, None, None])

    def forward(self, rows: Tensor) -> Tensor:
        """One stream in which all rows attend to all: (B, rows, dim) -> the same."""
        normed = self.norm1(rows)
        keys, values = self.attn.keys_values(normed)
        attended = scaled_dot_product_attention(self.attn.queries(normed), keys, values)
        return self._residuals(rows, attended, None)

    def two_streams(self, rows: Tensor, unmasked: int, pattern: Tensor, keep: Tensor | None) -> Tensor:
        """Both streams at once: rows (B, V + M + 2M, dim) are V and auxiliary, patches by rank, queries by rank.

        The first `unmasked` = V + M rows attend to one another without a mask, the others by `pattern`.
        """
        normed = self.norm1(rows)
        queries = self.attn.queries(normed)
        keys, values = self.attn.keys_values(normed[:, : pattern.shape[1]])
        free = scaled_dot_product_attention(queries[:, :, :unmasked], keys[:, :, :unmasked], values[:, :, :unmasked])
        ordered = scaled_dot_product_attention(queries[:, :, unmasked:], keys, values, attn_mask=pattern)
        return self._residuals(rows, torch.cat([free, ordered], dim=2), keep)

    def last_queries(self, rows: Tensor, pattern: Tensor, keep: Tensor | None) -> Tensor:
        """The last block: only the query rows are needed from it, the content gives keys and values. -> (B, M, dim)"""
        content = pattern.shape[1]
        normed = self.norm1(rows)
        keys, values = self.attn.keys_values(normed[:, :content])
        queries = self.attn.queries(normed[:, content:])
        predicted = queries.shape[2]
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=pattern[predicted:])
        return self._residuals(rows[:, content:], attended, keep)


class MaPeT(nn.Module):
    """The model. `forward` pre-trains, `encode` is the plain ViT that remains afterwards."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbed(shape.patch_size, shape.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.patches, shape.dim))
        self.mask_positional_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.dim, eps=_NORM_EPS)
        self.decoder = nn.Linear(shape.dim, shape.k)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.mask_positional_token, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, order: Tensor, visible: int, keep: Tensor | None = None) -> Tensor:
        """Predicts the tokens of all patches after the first `visible` of each image's permutation.

        Args:
            images: (B, 3, S, S) float, normalised.
            order: (B, N) int64, a permutation of the patches in raster order for each image, visible ones first.
            visible: how many patches are given (class token not counted).
            keep: (B, depth, 2) float, drop path as in `Block`; None keeps everything.

        Returns:
            logits (B, N - visible, K) in permutation order.

        Raises:
            UsageError if `images` or `order` do not fit the model, or `visible` leaves nothing to predict.
        """
        self._check(images, order, visible)
        patches = self.shape.patches
        given, predicted = 1 + visible, patches - visible
        pattern = attention_pattern(given, predicted, images.device)
        rows = self._embed(images, order, visible)
        for index, block in enumerate(self.blocks[:-1]):
            rows = block.two_streams(rows, given + predicted, pattern, None if keep is None else keep[:, index])
        queries = self.blocks[-1].last_queries(rows, pattern, None if keep is None else keep[:, -1])
        return self.decoder(self.norm(queries))

    def _check(self, images: Tensor, order: Tensor, visible: int) -> None:
        size, patches = self.shape.image_size, self.shape.patches
        if images.shape[1:] != (3, size, size):
            raise UsageError(f"images are {tuple(images.shape)}; this model takes (B, 3, {size}, {size}).")
        if order.shape != (len(images), patches):
            raise UsageError(f"order is {tuple(order.shape)}; this model takes ({len(images)}, {patches}).")
        if not 0 <= visible < patches:
            raise UsageError(f"visible {visible} must be at least 0 and less than the {patches} patches of an image.")

    def _embed(self, images: Tensor, order: Tensor, visible: int) -> Tensor:
        """Rows (B, V + M + M + M, dim): class token and visible patches, auxiliary, patches, queries; by rank."""
        batch = len(images)
        by_rank = order[:, :, None].expand(-1, -1, self.shape.dim)
        positions = self.pos_embed[:, 1:].expand(batch, -1, -1).gather(1, by_rank)
        content = self.patch_embed(images).gather(1, by_rank) + positions
        first = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        auxiliary = self.mask_positional_token + positions[:, visible:]
        return torch.cat([first, content[:, :visible], auxiliary, content[:, visible:], auxiliary], dim=1)

    def encode(self, images: Tensor) -> Tensor:
        """The plain ViT: images (B, 3, S, S) float -> rows after the last block (B, 1 + N, dim), class token first."""
        rows = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1) + self.pos_embed
        for block in self.blocks:
            rows = block(rows)
        return rows

    def features(self, images: Tensor) -> Tensor:
        """One vector an image: the mean over patches of the final norm's output, (B, dim)."""
        return self.norm(self.encode(images)[:, 1:]).mean(dim=1)


def drop_path_rates(depth: int, rate: float) -> Tensor:
    """(depth,) float: from 0 in the first block linearly to `rate` in the last (as timm does)."""
    return torch.linspace(0, rate, depth)


def drop_path_keep(draws: Tensor, rate: float) -> Tensor | None:
    """Turns uniform draws (B, depth, 2) into what `MaPeT.forward` takes as `keep`; None if `rate` is 0."""
    if rate == 0:
        return None
    survive = 1 - drop_path_rates(draws.shape[1], rate).to(draws)[None, :, None]
    return (draws < survive).to(draws) / survive
