"""The sizes of a model."""

from dataclasses import asdict, dataclass

from ...shared.errors import UsageError

SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
"""(dim, depth, heads) of the model names `vit-tiny` ... `vit-large`."""


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
