"""The fine-tuning model: the plain ViT of MaPeT, the mean over its patches, a norm and a linear head.

Parameters carry the names of the published fine-tuned checkpoints, so that `weights.weights.Weights` holds them as a
"classifier".
"""

from torch import Tensor, nn

from .mapet import NORM_EPS
from .plain_vit import PlainViT
from .shape import Shape


class Classifier(PlainViT):
    """Images (B, 3, S, S) float, normalised -> logits (B, classes)."""

    def __init__(self, shape: Shape, classes: int):
        """A model with fresh weights; `shape.k` is not used."""
        super().__init__(shape)
        self.classes = classes
        self.fc_norm = nn.LayerNorm(shape.dim, eps=NORM_EPS)
        self.head = nn.Linear(shape.dim, classes)
        self.initialise()

    def forward(self, images: Tensor, drop_path_scale: Tensor | None = None) -> Tensor:
        """The logits. Arguments and errors: see `PlainViT.encode`."""
        rows = self.encode(images, drop_path_scale)[-1]
        logits: Tensor = self.head(self.fc_norm(rows[:, 1:].mean(dim=1)))
        return logits
