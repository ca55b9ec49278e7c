"""UPerNet on the plain ViT of MaPeT, as BEiT v2 fine-tunes it for segmentation (arXiv 1807.10221, 2208.06366).

Norms are GroupNorm with groups of 16 channels (arXiv 1803.08494) where BEiT has SyncBatchNorm: an image's result does
not depend on the other images that are computed with it, so that processes and micro-batches do not change a step, and
there are no running statistics to keep beside the weights.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from .plain_vit import PlainViT
from .shape import Shape

POOLS = (1, 2, 3, 6)
"""Sides of the pooled maps of the pyramid pooling module."""
GROUP = 16
"""Channels of a group of GroupNorm."""
AUXILIARY_CHANNELS = 256
"""Most channels of the auxiliary head, as published."""
_TAPS = (1 / 3, 1 / 2, 2 / 3, 1)
"""Where BEiT reads features, as shares of the depth: blocks 4, 6, 8 and 12 of 12, blocks 8, 12, 16 and 24 of 24."""


def tapped_blocks(depth: int) -> tuple[int, ...]:
    """The four blocks, from 0, whose outputs are read: after a third, a half, two thirds and all of the depth.

    Shares are rounded; a model of fewer than four blocks gives one of them more than once.
    """
    return tuple(max(1, round(depth * share)) - 1 for share in _TAPS)


def auxiliary_channels(channels: int) -> int:
    """The channels of the auxiliary head beside a head of `channels`."""
    return min(channels, AUXILIARY_CHANNELS)


def dropped_channels(channels: int) -> int:
    """The number of channels that dropout draws for: those of the head, then those of the auxiliary head."""
    return channels + auxiliary_channels(channels)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w) at another size, bilinear between pixel centres."""
    return interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // math.gcd(GROUP, channels), channels)


def _layer(inputs: int, outputs: int, side: int) -> nn.Sequential:
    """A convolution without bias, norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, _norm(outputs), nn.ReLU(inplace=True))


def _classifier(channels: int, classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Neck(nn.Module):
    """Four maps (B, dim, G, G) of a ViT -> maps of side 4 G, 2 G, G and G / 2, as in BEiT."""

    def __init__(self, dim: int):
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), _norm(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
        )
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.down2 = nn.MaxPool2d(2, 2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, fourth = maps
        return [self.up4(first), self.up2(second), third, self.down2(fourth)]


class PyramidHead(nn.Module):
    """UPerNet's head: pyramid pooling on the smallest map, a feature pyramid over all four, their fusion at the largest
    one's size: logits (B, classes, 4 G, 4 G)."""

    def __init__(self, dim: int, channels: int, classes: int):
        super().__init__()
        self.pooled = nn.ModuleList(_layer(dim, channels, 1) for _ in POOLS)
        self.bottleneck = _layer(dim + len(POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList(_layer(dim, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_layer(channels, channels, 3) for _ in range(3))
        self.fusion = _layer(4 * channels, channels, 3)
        self.classifier = _classifier(channels, classes)

    def forward(self, maps: Sequence[Tensor], dropout_scale: Tensor | None = None) -> Tensor:
        """`dropout_scale`: (B, channels) factors of the fused map's channels, 0 where dropped; None drops nothing."""
        smallest = maps[-1]
        pooled = [
            resize(layer(adaptive_avg_pool2d(smallest, side)), _size(smallest))
            for side, layer in zip(POOLS, self.pooled, strict=True)
        ]
        levels = [layer(one) for layer, one in zip(self.laterals, maps[:3], strict=True)]
        levels.append(self.bottleneck(torch.cat([smallest, *pooled], dim=1)))
        for index in (2, 1, 0):
            levels[index] = levels[index] + resize(levels[index + 1], _size(levels[index]))
        smoothed = [layer(one) for layer, one in zip(self.smooth, levels[:3], strict=True)]
        whole = _size(smoothed[0])
        fused = self.fusion(torch.cat([smoothed[0], *(resize(one, whole) for one in (*smoothed[1:], levels[3]))], 1))
        logits: Tensor = self.classifier(_dropped(fused, dropout_scale))
        return logits


class AuxiliaryHead(nn.Module):
    """A fully convolutional head on one map (B, dim, G, G): logits (B, classes, G, G). It only helps training."""

    def __init__(self, dim: int, channels: int, classes: int):
        super().__init__()
        self.layer = _layer(dim, channels, 3)
        self.classifier = _classifier(channels, classes)

    def forward(self, maps: Tensor, dropout_scale: Tensor | None = None) -> Tensor:
        """`dropout_scale`: as for `PyramidHead`."""
        logits: Tensor = self.classifier(_dropped(self.layer(maps), dropout_scale))
        return logits


class UPerNet(PlainViT):
    """Images (B, 3, S, S) float, normalised -> logits of classes; S is at least two patches."""

    def __init__(self, shape: Shape, classes: int, channels: int):
        """A model with fresh weights; `shape.k` is not used. `channels` are those of the head, a multiple of 16."""
        super().__init__(shape)
        self.classes, self.channels = classes, channels
        self.neck = Neck(shape.dim)
        self.decode_head = PyramidHead(shape.dim, channels, classes)
        self.auxiliary_head = AuxiliaryHead(shape.dim, auxiliary_channels(channels), classes)
        self.initialise()

    def forward(
        self, images: Tensor, drop_path_scale: Tensor | None = None, dropout_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logits of the head (B, classes, 4 G, 4 G) and of the auxiliary head (B, classes, G, G), of G x G patches.

        Args:
            images: (B, 3, S, S) float, normalised.
            drop_path_scale: (B, depth, 2) float, as for `PlainViT.encode`.
            dropout_scale: (B, `dropped_channels`) float, the factors of channels before both classifiers; None
                drops nothing.

        Raises:
            UsageError if `images` do not fit the model.
        """
        maps = self._maps(images, drop_path_scale)
        head, auxiliary = None, None
        if dropout_scale is not None:
            head, auxiliary = dropout_scale[:, : self.channels], dropout_scale[:, self.channels :]
        return self.decode_head(maps, head), self.auxiliary_head(maps[2], auxiliary)

    def segment(self, images: Tensor) -> Tensor:
        """The logits of the head at the images' size, (B, classes, S, S)."""
        return resize(self.decode_head(self._maps(images)), _size(images))

    def _maps(self, images: Tensor, drop_path_scale: Tensor | None = None) -> list[Tensor]:
        rows, grid = self.encode(images, drop_path_scale), self.shape.image_size // self.shape.patch_size
        tapped = [
            rows[block][:, 1:].mT.reshape(len(images), -1, grid, grid) for block in tapped_blocks(self.shape.depth)
        ]
        maps: list[Tensor] = self.neck(tapped)
        return maps


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[2], maps.shape[3]


def _dropped(maps: Tensor, scale: Tensor | None) -> Tensor:
    return maps if scale is None else maps * scale[:, :, None, None]
