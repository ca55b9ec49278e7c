"""Color jitter of the student's pixels: drawn per image in the loader, applied to whole batches on the device."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION = range(3)
_GREY = (0.299, 0.587, 0.114)


def draw_jitter(strength: float, random: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(3,) float32, the factors of brightness, contrast and saturation, each from [1 - strength, 1 + strength]; and
    (3,) int64, the order in which they are applied (as torchvision's `ColorJitter` draws, no hue)."""
    return random.uniform(1 - strength, 1 + strength, size=3).astype(np.float32), random.permutation(3)


def jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Applies what `draw_jitter` drew to float images (B, 3, S, S) in [0, 255], contiguous, in place, and returns them.

    As torchvision's adjustments, but nothing is rounded. `factors` is (B, 3) float, `order` (B, 3) int64.
    """
    weights, pixels = torch.tensor([_GREY], device=images.device), images.flatten(2)
    for which in order.unbind(1):
        factor, kind = factors.gather(1, which[:, None])[:, :, None], which[:, None, None]
        grey = weights @ pixels
        # An image becomes a mixture of itself and black, its mean grey, or itself in grey.
        other = torch.where(kind == CONTRAST, grey.mean(2, keepdim=True), grey).masked_fill_(kind == BRIGHTNESS, 0)
        pixels.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 255)
    return images
