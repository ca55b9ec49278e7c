"""The normalisation of pixels that every model uses."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Pixels (B, 3, S, S) in [0, 255] -> float32 (pixel / 255 - mean) / std on `device`.

    Float32 pixels that are on `device` already are changed in place. The arithmetic is that of torchvision's ToTensor
    and Normalize, in the same order, so that results are equal.
    """

    mean: Tensor
    """(1, 3, 1, 1) float32, of pixels in [0, 1]."""
    std: Tensor
    """(1, 3, 1, 1) float32, of pixels in [0, 1]."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.mean.device, torch.float32).div_(255).sub_(self.mean).div_(self.std)
