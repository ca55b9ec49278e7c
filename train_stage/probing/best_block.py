"""The block of a model whose features serve a linear classifier best."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...shared.errors import UsageError
from ...shared.runtime.console import working
from ...shared.runtime.memory import as_text, memory_budget
from ..evaluation.embed import Execution, embed_blocks, normalised_views, refuse_not_finite
from ..evaluation.held_out import HELD_OUT
from ..evaluation.labelled import LabelledImages
from ..weights.weights import Weights
from .linear_probe import held_out_accuracy

LAST, BEST = "last", "best"


@dataclass(frozen=True)
class BlockChoice:
    """Accuracies of the linear probe on held-out training images by block, and the best block."""

    held_out_top1: tuple[float, ...]

    @property
    def block(self) -> int:
        """From 0; of equally good ones the last."""
        return max(range(len(self.held_out_top1)), key=lambda block: (self.held_out_top1[block], block))

    def to_json(self) -> dict[str, Any]:
        return {
            "block": self.block,
            "held_out_top1": list(self.held_out_top1),
            "chosen": f"by the linear probe on {HELD_OUT:.0%} of the training images",
        }


def parse_block(block: str | int, depth: int) -> int | None:
    """The block that an option names, from 0; None for "best". Raises UsageError for a block that is not there."""
    if block == BEST:
        return None
    if block == LAST:
        return depth - 1
    try:
        number = int(block)
    except ValueError:
        number = depth
    if not -depth <= number < depth:
        raise UsageError(
            f"--block {block} is not a block of this model; give {BEST}, {LAST} or a number from 0 to {depth - 1} "
            "(negative: from the end)."
        )
    return number % depth


def choose_block(weights: Weights, train: LabelledImages, execution: Execution) -> BlockChoice:
    """Measures the features of every block by the linear probe on a tenth of the training images.

    Raises:
        DataError for an image that cannot be read, or whose features hold NaN or infinity; UsageError if the features
        of all blocks do not fit into memory.
    """
    depth, dim, count = weights.shape.depth, weights.shape.dim, len(train)
    needed = 4 * count * depth * dim
    if needed > (free := memory_budget(None)):
        raise UsageError(
            f"--block {BEST} holds the features of {depth} blocks for {count:,} images in memory, {as_text(needed)}, "
            f"and {as_text(free)} can be used; give fewer images, or a block."
        )
    features = torch.empty(depth, count, dim)
    _fill(features, weights, train, execution)
    labels = train.labels.to(execution.device)
    with working("measuring each block"):
        return BlockChoice(tuple(held_out_accuracy(of_block.to(execution.device), labels) for of_block in features))


@torch.no_grad()
def _fill(features: Tensor, weights: Weights, images: LabelledImages, execution: Execution) -> None:
    """Writes the pooled features of all blocks into `features` (depth, n, dim)."""
    model, depth, records = weights.vit().to(execution.device), weights.shape.depth, images.records
    start = 0
    for batch in normalised_views(
        records, weights.preprocess, execution.batch_size, execution.workers, execution.device
    ):
        pooled = torch.stack([of_block for of_block, _ in embed_blocks(model, batch, range(depth))])
        refuse_not_finite(pooled.transpose(0, 1), records[start:], "features of a block")
        features[:, start : start + len(batch)] = pooled.cpu()
        start += len(batch)
        execution.advance(len(batch))
