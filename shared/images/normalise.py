"""The normalisation that every model's pixels go through."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """Pixels (B, 3, S, S) in [0, 255] -> float32 (pixel / 255 - mean) / std on `device`; floats there change in place.

    The arithmetic of torchvision's ToTensor and Normalize, in their order, so that results equal theirs.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.mean.device, torch.float32).div_(255).sub_(self.mean).div_(self.std)
