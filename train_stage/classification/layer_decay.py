"""Layer-wise learning-rate decay of a ViT, as in BEiT and timm's `param_groups_layer_decay`."""

import re

from torch import Tensor

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_EMBEDDING = ("cls_token", "pos_embed", "patch_embed.")
_NOT_DECAYED = ("cls_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter: 0 for class token, positions and patch embedding, 1 to `depth` for the blocks, and
    `depth` + 1 for `fc_norm` and `head`."""
    if name.startswith(_EMBEDDING):
        return 0
    block = _BLOCK.match(name)
    return depth + 1 if block is None else 1 + int(block[1])


def lr_scale(name: str, depth: int, layer_decay: float) -> float:
    """The factor of a parameter's learning rate: `layer_decay` to the power of its distance from the head."""
    return float(layer_decay ** (depth + 1 - layer_of(name, depth)))


def without_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is exempt from weight decay: 1-D parameters, positions and class token."""
    return parameter.ndim <= 1 or name in _NOT_DECAYED
