"""The sizes of a model."""

from dataclasses import asdict, dataclass
from typing import Any

from ...shared.errors import UsageError

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""(dim, depth, heads) of the model names `vit-tiny` ... `vit-large`."""


@dataclass(frozen=True)
class Shape:
    """The sizes that determine a model's tensors. Raises UsageError for sizes that do not divide each other."""

    dim: int
    """Width of a row."""
    depth: int
    """Number of blocks."""
    heads: int
    """Attention heads per block."""
    patch_size: int
    """Pixels along one side of a patch."""
    image_size: int
    """Pixels along one side of an image."""
    k: int
    """Number of codes that the head predicts."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer, as a multiple of `dim`."""

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise UsageError(f"model.dim {self.dim} is not a multiple of model.heads {self.heads}.")
        if self.image_size % self.patch_size:
            raise UsageError(
                f"model.image_size {self.image_size} is not a multiple of model.patch_size {self.patch_size}."
            )

    @property
    def patches(self) -> int:
        """N, the number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
