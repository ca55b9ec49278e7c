"""RankMe: the effective rank of frozen features, which needs no labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation.base import EvaluationResult, FrozenEvaluation
from ..evaluation.embed import FrozenFeatures

EPSILON = 1e-7
"""The published one, of float32."""


@dataclass(frozen=True)
class RankMe(FrozenEvaluation):
    """RankMe of the pooled features of training images (arXiv 2210.02885)."""

    images: int = 25_600
    """How many images are used at most, as published; drawn by a fixed seed."""

    @property
    def name(self) -> str:
        return "rankme"

    def measure(self, features: FrozenFeatures) -> EvaluationResult:
        drawn = torch.randperm(len(features.train), generator=torch.Generator().manual_seed(0))[: self.images]
        rank = effective_rank(features.train[drawn.to(features.train.device)])
        protocol = {
            "formula": "exp(-sum p log p) with p = singular values / their sum + epsilon; features are not centred",
            "epsilon": EPSILON,
            "images": len(drawn),
            "features": features.to_json(),
        }
        return EvaluationResult(self.name, protocol, {"effective_rank": rank})


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values of features (n, dim), normalised to a sum of one; from 1 to
    min(n, dim), and 0 if all features are zero."""
    values = torch.linalg.svdvals(features.double())
    if not values.sum():
        return 0.0
    shares = values / values.sum() + EPSILON
    return torch.exp(-(shares * shares.log()).sum()).item()
