"""The attentive probe: attention over frozen patch features, trained for a grid of hyper-parameters at once."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...shared.errors import UsageError
from ...shared.runtime.console import progress
from ..evaluation.base import EvaluationResult, FrozenEvaluation
from ..evaluation.classes import number_classes
from ..evaluation.embed import FrozenFeatures
from ..evaluation.held_out import HELD_OUT, split_held_out
from ..evaluation.patch_features import DTYPE, PatchFeatures
from ..evaluation.schedule import warmup_cosine
from .attentive_head import AttentiveHead, attention_heads, grid_logits

LEARNING_RATES = (4e-5, 8e-5, 2e-4, 4e-4, 8e-4, 2e-3, 4e-3, 8e-3, 2e-2, 4e-2)
"""The published ones, 1e-5 to 1e-2 per 256 images, for the published batch of 1,024. Smaller batches keep them: scaled
down with the batch, heads of small sets would hardly move from their initial weights."""
WEIGHT_DECAYS = (5e-4, 1e-3, 5e-2)
BETAS = (0.9, 0.95)
ITERATIONS, BATCH = 12_500, 1024
"""The published budget."""
EPOCHS, STEPS_PER_EPOCH = 11, 50
"""Sets smaller than ImageNet get as many passes as ImageNet's training images in the published budget, of so many steps
each."""
FEWEST_ITERATIONS, SMALLEST_BATCH = 500, 32
WARMUP = 0.1
"""Share of the iterations in which the learning rate rises."""
_MOST_NUMBERS = 2**27
"""Most float32 numbers that the attention of a part of a batch takes (0.5 GB)."""


@dataclass(frozen=True)
class Budget:
    """How long the heads train."""

    iterations: int
    batch: int

    @classmethod
    def of(cls, images: int, iterations: int | None = None, batch: int | None = None) -> "Budget":
        """The budget for so many images; by default the published one, scaled down for small sets."""
        if batch is None:
            batch = min(max(images // STEPS_PER_EPOCH, SMALLEST_BATCH), BATCH)
        batch = min(batch, images)
        if iterations is None:
            iterations = min(max(EPOCHS * (images // batch), FEWEST_ITERATIONS), ITERATIONS)
        return cls(iterations, batch)


@dataclass(frozen=True)
class AttentiveProbe(FrozenEvaluation):
    """The attentive probe of CAPI (arXiv 2502.08769, section 4 and its published code) on features that are frozen.

    A head is trained for each pair of learning rate and weight decay, all from the same initial weights on the same
    batches. The pair is chosen on a tenth of the training images; its head, trained on the other nine, is measured
    without fitting it again. Published heads see random crops and flips, these the features of centre crops.
    """

    iterations: int | None = None
    """Steps; None is `Budget.of`."""
    batch: int | None = None
    """Images a step; None is `Budget.of`."""
    learning_rates: Sequence[float] = LEARNING_RATES
    """Whatever the batch."""
    weight_decays: Sequence[float] = WEIGHT_DECAYS
    seed: int = 0
    """Of the initial weights and of the order of images."""

    reads_patches: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "attentive"

    def measure(self, features: FrozenFeatures) -> EvaluationResult:
        """Raises UsageError if `features` have no patches."""
        if features.train_patches is None or features.val_patches is None:
            raise UsageError("The attentive probe reads the features of each patch; extract them, too (patches=True).")
        train, labels, val, val_labels = (
            features.train_patches,
            features.train_labels,
            features.val_patches,
            features.val_labels,
        )
        labels, val_labels, classes = number_classes(labels, val_labels)
        grid = list(itertools.product(self.learning_rates, self.weight_decays))
        choose, fit = split_held_out(len(train))
        budget = Budget.of(len(fit), self.iterations, self.batch)
        heads = train_grid(train, labels, fit, classes, grid, budget, self.seed)
        scores = accuracies(heads, train, labels, choose)
        best = max(range(len(grid)), key=scores.__getitem__)
        top1 = accuracies([heads[best]], val, val_labels, torch.arange(len(val)))[0]
        return EvaluationResult(self.name, self._protocol(features, budget, grid, scores, best), {"top1": top1})

    def _protocol(
        self,
        features: FrozenFeatures,
        budget: Budget,
        grid: Sequence[tuple[float, float]],
        scores: Sequence[float],
        best: int,
    ) -> dict[str, Any]:
        assert features.train_patches is not None
        patches, dim = features.train_patches.shape
        learning_rate, weight_decay = grid[best]
        return {
            "classifier": "one learned query attends to the patches (key and value linear), then a linear classifier",
            "heads": attention_heads(dim),
            "optimizer": f"AdamW, betas {BETAS}, weight decay on all but biases",
            "schedule": f"{WARMUP:.0%} warm-up, then cosine to 0",
            "iterations": budget.iterations,
            "batch": budget.batch,
            "published_budget": {"iterations": ITERATIONS, "batch": BATCH},
            "learning_rates": list(self.learning_rates),
            "weight_decays": list(self.weight_decays),
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "held_out_top1": [
                {"learning_rate": pair[0], "weight_decay": pair[1], "top1": score}
                for pair, score in zip(grid, scores, strict=True)
            ],
            "hyper_parameters": f"chosen on {HELD_OUT:.0%} of the training images; not refitted on all of them",
            "augmentation": "none: features of the centre crop",
            "seed": self.seed,
            "patches": {"feature": features.patch_feature, "count": patches, "dim": dim, "dtype": DTYPE},
            "features": features.to_json(),
        }


def train_grid(
    patches: PatchFeatures,
    labels: Tensor,
    images: Tensor,
    classes: int,
    grid: Sequence[tuple[float, float]],
    budget: Budget,
    seed: int,
) -> list[AttentiveHead]:
    """Trains one head for each (learning rate, weight decay) of a grid, all at once.

    Args:
        patches: the features of all images.
        labels: (n,) int64, their classes from 0 on; the heads are on the same device.
        images: (m,) int64 on the CPU, indices of the images to train on.
        classes: how many there are.
        grid: learning rates and weight decays.
        budget: steps and images a step.
        seed: of the initial weights, which all heads share, and of the order of the images.
    """
    initial = AttentiveHead(patches.shape[1], classes, seed)
    heads = [copy.deepcopy(initial).to(labels.device) for _ in grid]
    groups = [
        group
        for head, (learning_rate, weight_decay) in zip(heads, grid, strict=True)
        for group in _parameter_groups(head, learning_rate, weight_decay)
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    warmup = int(budget.iterations * WARMUP)
    share = partial(warmup_cosine, steps=budget.iterations, warmup=warmup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    most = _images_at_once(len(grid), *patches.shape)
    with progress("training attentive probes", budget.iterations, "steps") as advance:
        for batch in _batches(images, budget, seed):
            optimizer.zero_grad()
            for part in torch.split(batch, most):
                logits = grid_logits(heads, patches.rows(part).to(labels.device))
                truth = labels[part.to(labels.device)].repeat(len(grid))
                loss = cross_entropy(logits.flatten(0, 1), truth, reduction="sum") / len(batch)
                torch.autograd.backward([loss])
            optimizer.step()
            scheduler.step()
            advance()
    return heads


def _parameter_groups(head: nn.Module, learning_rate: float, weight_decay: float) -> Iterator[dict[str, Any]]:
    biases = [parameter for name, parameter in head.named_parameters() if "bias" in name]
    weights = [parameter for name, parameter in head.named_parameters() if "bias" not in name]
    yield {"params": weights, "lr": learning_rate, "weight_decay": weight_decay}
    yield {"params": biases, "lr": learning_rate, "weight_decay": 0.0}


def _batches(images: Tensor, budget: Budget, seed: int) -> Iterator[Tensor]:
    """Indices of the images of each step; every pass over the images has an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(images) // budget.batch
    for first_step in range(0, budget.iterations, per_epoch):
        shuffled = images[torch.randperm(len(images), generator=generator)]
        for step in range(min(per_epoch, budget.iterations - first_step)):
            yield shuffled[step * budget.batch : (step + 1) * budget.batch]


def _images_at_once(heads: int, patches: int, dim: int) -> int:
    """How many images have their attention in memory at a time."""
    return max(1, _MOST_NUMBERS // (heads * attention_heads(dim) * 2 * (patches + dim)))


@torch.no_grad()
def accuracies(heads: Sequence[AttentiveHead], patches: PatchFeatures, labels: Tensor, images: Tensor) -> list[float]:
    """Top-1 accuracy of each head on the images at some indices, (m,) int64 on the CPU."""
    correct = torch.zeros(len(heads), dtype=torch.int64, device=labels.device)
    for part in torch.split(images, min(_images_at_once(len(heads), *patches.shape), BATCH)):
        logits = grid_logits(heads, patches.rows(part).to(labels.device))
        correct += (logits.argmax(2) == labels[part.to(labels.device)]).sum(1)
    return [count / len(images) for count in correct.tolist()]
