"""The logits of a classifier on images, and what they achieve."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...shared.images.views import Preprocess
from ...shared.sources.records import ImageRecord
from ..evaluation.embed import Execution, normalised_views
from ..weights.weights import Weights

DEFAULT_CROP = 0.9
"""Where weights do not say which share of the image their evaluation crops: that of the published protocol."""


def evaluation_preprocess(weights: Weights) -> Preprocess:
    """Resizes the shorter side to floor(size / crop) and crops the centre, as timm does.

    The crop is the weights' own share, or `DEFAULT_CROP` if they have none.
    """
    share = weights.input.crop_pct or DEFAULT_CROP
    return replace(weights.preprocess, resize_size=math.floor(weights.shape.image_size / share))


@torch.no_grad()
def classify(weights: Weights, records: Sequence[ImageRecord], execution: Execution) -> Tensor:
    """Logits (n, classes) float32 on the CPU, in full float32 precision. Raises DataError for an unreadable image."""
    model = weights.vit().to(execution.device)
    views = normalised_views(
        records, evaluation_preprocess(weights), execution.batch_size, execution.workers, execution.device
    )
    parts = []
    # cuDNN would otherwise round float32 to TF32.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for images in views:
            parts.append(model(images).cpu())
            execution.advance(len(images))
    return torch.cat(parts)


def top_k(logits: Tensor, classes: Tensor, k: int) -> Tensor:
    """(n,) bool: whether the class is among the k largest logits (n, classes); all of them if there are fewer."""
    return (logits.topk(min(k, logits.shape[1]), dim=1).indices == classes[:, None]).any(1)
