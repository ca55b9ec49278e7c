"""The tenth of the training images on which every hyper-parameter is chosen."""

import torch
from torch import Tensor

from ...shared.errors import DataError

HELD_OUT = 0.1
"""Share of the training images on which hyper-parameters are chosen."""


def split_held_out(count: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Indices of the held-out images and of the others, int64, drawn by a fixed seed.

    Raises DataError for fewer than two images.
    """
    if count < 2:
        raise DataError(
            f"The probe got {count} training image; it needs two or more, as one in ten is held out for choices."
        )
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)
    held_out = max(1, int(count * HELD_OUT))
    return shuffled[:held_out], shuffled[held_out:]
