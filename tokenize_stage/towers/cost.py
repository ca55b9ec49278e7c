"""What a tower costs, from its sizes alone: no weights are read, drawn or computed with."""

import math
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...shared.runtime.compat import fake_tensors
from .loading import RANDOM
from .opening import open_model
from .pixel_patches import NAME as PIXELS
from .tower import TowerSettings


@dataclass(frozen=True)
class TowerCost:
    """What tokens of a tower cost."""

    flops: int
    """Of one image forward, as `torch.utils.flop_counter` counts them."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    dim: int
    """Length of a patch's features."""

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return math.prod(self.grid)


PUBLISHED = {"vqkd": TowerCost(35_366_965_248, (14, 14), 32), "dvae": TowerCost(45_542_146_048, (14, 14), 2048)}
"""Encoders of BEiT v2 (ViT-B/16 with its head, 224 px) and of DALL-E (112 px); tests count them anew."""


def tower_cost(settings: TowerSettings) -> TowerCost | None:
    """The cost of the tower of an open_clip or timm name, of `local-dir:PATH` or of `pixels`.

    Returns:
        None for `hf-hub:ID`, whose sizes would have to be downloaded.

    Raises:
        UsageError: the name or the layer is unknown.
        DataError: the library cannot open the model.
    """
    if settings.tower.startswith("hf-hub:"):
        return None
    if settings.tower.partition(":")[0] != PIXELS:  # which have no weights
        settings = replace(settings, pretrained=RANDOM)
    with torch.device("meta"):
        opened = open_model(settings)
    size = opened.preprocess.image_size
    # With gradients, as the fused attention of inference is not counted.
    with fake_tensors(), FlopCounterMode(display=False) as counter:
        opened.module.eval().to_empty(device="cpu")
        maps = opened.intermediates(torch.empty(1, 3, size, size), settings.layer, settings.final_norm)
    rows, columns = maps.shape[-2:]
    return TowerCost(int(counter.get_total_flops()), (rows, columns), maps.shape[1])
