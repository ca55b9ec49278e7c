"""The logits of a classifier on images, and what they achieve."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...shared.errors import DataError
from ...shared.images.decode import read_image
from ...shared.images.normalise import Normalise
from ...shared.images.views import Preprocess, center_view, to_array
from ...shared.runtime.loader import OneByOne, batches
from ...shared.sources.records import ImageRecord
from ..evaluation.embed import Execution, refuse_not_finite
from ..weights.weights import Weights

DEFAULT_CROP = 0.9
"""Where weights do not say which share of the image their evaluation crops: that of the published protocol."""


def evaluation_preprocess(weights: Weights) -> Preprocess:
    """Resizes the shorter side to floor(size / crop) and crops the centre, as timm does.

    The crop is the weights' own share, or `DEFAULT_CROP` if they have none.
    """
    share = weights.input.crop_pct or DEFAULT_CROP
    return replace(weights.preprocess, resize_size=math.floor(weights.shape.image_size / share))


@dataclass(frozen=True)
class LogitsBatch:
    """The logits of consecutive images."""

    records: list[ImageRecord]
    """The B images that could be read."""
    logits: Tensor
    """(B, classes) float32 on the CPU."""
    skipped: list[tuple[str, str]]
    """(key, reason) of the images between them that could not be read."""


@dataclass(frozen=True)
class _LoadView:
    """Decodes an image and cuts out its view; runs in a worker."""

    preprocess: Preprocess
    skip: bool

    def __call__(self, record: ImageRecord) -> dict[str, Any]:
        try:
            image, _ = read_image(record)
        except DataError as error:
            if not self.skip:
                raise
            size = self.preprocess.image_size
            return {"problem": str(error).rstrip("."), "pixels": np.zeros((3, size, size), dtype=np.uint8)}
        return {"problem": "", "pixels": to_array(center_view(image, self.preprocess))}


@torch.no_grad()
def logits_by_batch(
    weights: Weights, records: Sequence[ImageRecord], execution: Execution, *, skip: bool = False
) -> Iterator[LogitsBatch]:
    """Yields the logits of images, in order and in full float32 precision.

    With `skip`, unreadable images are listed in their batch. Raises DataError for an unreadable image otherwise, and
    for logits that are not finite.
    """
    preprocess = evaluation_preprocess(weights)
    model = weights.vit().to(execution.device)
    normalise = Normalise(preprocess.mean, preprocess.std, execution.device)
    size = execution.batch_size
    parts = [records[start : start + size] for start in range(0, len(records), size)]
    loaded = batches(OneByOne(_LoadView(preprocess, skip)), parts, execution.workers)
    for part, batch in zip(parts, loaded, strict=True):
        pairs = list(zip(part, batch["problem"], strict=True))
        readable = [record for record, problem in pairs if not problem]
        images = normalise(batch["pixels"][torch.tensor([not problem for _, problem in pairs])])
        # cuDNN would otherwise round float32 to TF32.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            logits = model(images).cpu() if readable else torch.empty(0, weights.classes)
        refuse_not_finite(logits, readable, "logits")
        execution.advance(len(part))
        yield LogitsBatch(readable, logits, [(record.key, problem) for record, problem in pairs if problem])


def classify(weights: Weights, records: Sequence[ImageRecord], execution: Execution) -> Tensor:
    """Logits (n, classes) float32 on the CPU, of at least one image. Raises DataError as `logits_by_batch` does."""
    return torch.cat([batch.logits for batch in logits_by_batch(weights, records, execution)])


def top_k(logits: Tensor, classes: Tensor, k: int) -> Tensor:
    """(n,) bool: whether the class is among the k largest logits (n, classes); all of them if there are fewer."""
    return (logits.topk(min(k, logits.shape[1]), dim=1).indices == classes[:, None]).any(1)
