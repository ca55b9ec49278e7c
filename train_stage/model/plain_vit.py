"""The plain ViT of MaPeT as the trunk of a model that is fine-tuned.

Parameters carry the names of the published checkpoints. LayerScale and drop path are those of pre-training.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...shared.errors import UsageError
from .mapet import Block, PatchEmbed, draw_linear_layers, plain_rows, refuse_other_size
from .shape import Shape


class PlainViT(nn.Module):
    """Embedding and blocks. A subclass adds what reads their rows, and then initialises everything."""

    def __init__(self, shape: Shape):
        """`shape.k` is not used."""
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbed(shape.patch_size, shape.dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.patches, shape.dim))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.grad_checkpointing = False
        """Whether the backward pass computes each block again instead of keeping its activations."""

    def initialise(self) -> None:
        """Draws the initial values of positions, class token and all linear layers."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        draw_linear_layers(self)

    def freeze(self, blocks: int) -> None:
        """Stops training of the embedding and the first `blocks` blocks; 0 freezes nothing.

        Raises UsageError if the model has fewer blocks.
        """
        if blocks > self.shape.depth:
            raise UsageError(f"model.freeze {blocks} is more than the {self.shape.depth} blocks of the model.")
        if blocks:
            for module in (self.patch_embed, *list(self.blocks)[:blocks]):
                module.requires_grad_(False)
            for parameter in (self.cls_token, self.pos_embed):
                parameter.requires_grad_(False)

    def encode(self, images: Tensor, drop_path_scale: Tensor | None = None) -> list[Tensor]:
        """The rows (B, 1 + N, dim) after each block, class token first.

        Args:
            images: (B, 3, S, S) float, normalised.
            drop_path_scale: (B, depth, 2) float, as for `MaPeT.predict_rows`; None drops nothing.

        Raises:
            UsageError if `images` do not fit the model.
        """
        refuse_other_size(images, self.shape)
        rows, pattern = plain_rows(self.patch_embed(images), self.cls_token, self.pos_embed)
        after = []
        for index, block in enumerate(self.blocks):
            scale = None if drop_path_scale is None else drop_path_scale[:, index]
            arguments: tuple[Any, ...] = (rows, [rows], pattern, scale)
            (rows,) = (
                checkpoint(block, *arguments, use_reentrant=False)
                if self.grad_checkpointing and torch.is_grad_enabled()
                else block(*arguments)
            )
            after.append(rows)
        return after
