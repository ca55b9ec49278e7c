"""The linear probe with few labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...shared.errors import UsageError
from ...shared.randomness import generator
from ..evaluation.base import EvaluationResult, FrozenEvaluation
from ..evaluation.embed import FrozenFeatures
from ..evaluation.held_out import HELD_OUT
from .linear_probe import linear_probe

LOW_SHOT = "low-shot "
"""How the names of these evaluations begin; the share follows."""


@dataclass(frozen=True)
class LowShot(FrozenEvaluation):
    """The linear probe on a class-balanced list of a share of the training images; nothing is read of the others."""

    share: float
    """Of the training images, in (0, 1)."""
    seed: int = 0
    """Of the list, which depends on it, on the keys and on the labels, and not on the order of the images."""

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> "LowShot":
        """Reads a share such as "1%". Raises UsageError for anything else."""
        try:
            share = float(text.strip().removesuffix("%")) / 100
        except ValueError:
            share = 0
        if not text.strip().endswith("%") or not 0 < share < 1:
            raise UsageError(f"--low-shot {text} is not a share of the training images; give one such as 1% or 10%.")
        return cls(share, seed)

    @property
    def name(self) -> str:
        return f"{LOW_SHOT}{self.share * 100:g}%"

    def measure(self, features: FrozenFeatures) -> EvaluationResult:
        chosen = balanced_list(features.train_keys, features.train_labels.tolist(), self.share, self.seed)
        drawn = torch.tensor(chosen, device=features.train.device)
        train, labels = features.train[drawn], features.train_labels[drawn]
        fit = linear_probe(train, labels, features.val, features.val_labels)
        keys = sorted(features.train_keys[index] for index in chosen)
        counts = torch.unique(labels, return_counts=True)[1]
        protocol = {
            **fit.to_json(),
            "hyper_parameters": f"chosen on {HELD_OUT:.0%} of the list, then refitted on all of it",
            "share": self.share,
            "images": len(chosen),
            "images_per_class": [int(counts.min()), int(counts.max())],
            "seed": self.seed,
            "list": "as many images of each class, drawn by seed and key",
            "list_sha256": hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest(),
            "features": features.to_json(),
        }
        return EvaluationResult(self.name, protocol, {"top1": fit.top1})


def balanced_list(keys: Sequence[str], labels: Sequence[int], share: float, seed: int) -> list[int]:
    """Indices of `share` of the images, in the order of their keys: as many of each class, at least one, and all of a
    class that has fewer."""
    classes: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        classes.setdefault(label, []).append(index)
    each = max(1, round(share * len(keys) / len(classes)))
    drawn = [index for of_class in classes.values() for index in _drawn(of_class, keys, each, seed)]
    return sorted(drawn, key=lambda index: keys[index])


def _drawn(images: Sequence[int], keys: Sequence[str], count: int, seed: int) -> list[int]:
    return sorted(images, key=lambda index: generator(seed, "low-shot", keys[index]).random())[:count]
