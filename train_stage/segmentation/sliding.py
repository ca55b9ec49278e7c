"""Measuring a segmentation by sliding windows: images of their own aspect ratio, at the size of their masks."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ...shared.images.normalise import Normalise
from ...shared.runtime.loader import OneByOne, batches
from ..evaluation.embed import Execution
from ..masked.crops import WholeImages
from ..masked.masked_images import MaskedImage
from .scores import Confusion, Measured

STRIDE = 341 / 512
"""Distance of the windows as a share of their side, as published by BEiT v2 and DINOv3."""
_CLASSES_AT_ONCE = 16


class Segmenter(Protocol):
    """What gives windows of images their logits."""

    features: str
    """Such as "pre-trained"."""
    classifier: str
    """The name of its row in a table."""
    protocol: dict[str, Any]
    """Everything that is needed to train it again, as plain JSON values."""

    def logits(self, images: Sequence[MaskedImage], windows: Tensor) -> Tensor:
        """Logits (B, classes, S, S) float32 of normalised windows (B, 3, S, S), each of one of the images.

        Raises DataError, which names the image, for logits that are not finite.
        """
        ...


@torch.no_grad()
def measure(
    segmenters: Sequence[Segmenter],
    whole: WholeImages,
    classes: int,
    shown: Collection[str],
    execution: Execution,
) -> list[Measured]:
    """Measures segmenters on whole images, of which the true classes are below `classes`; `shown` are keys whose
    predictions are kept.

    Raises DataError for an image or a mask that cannot be read.
    """
    preprocess, device = whole.preprocess, execution.device
    normalise = Normalise(preprocess.mean, preprocess.std, device)
    confusions = [Confusion(classes) for _ in segmenters]
    maps: list[dict[str, NDArray[np.int16]]] = [{} for _ in segmenters]
    indices = [[index] for index in range(len(whole.images))]
    for pair, one in zip(whole.images, batches(OneByOne(whole), indices, execution.workers), strict=True):
        pixels, truth = normalise(one["pixels"]), one["mask"][0]
        for segmenter, confusion, of_segmenter in zip(segmenters, confusions, maps, strict=True):
            logits = _window_logits(segmenter, pair, pixels, preprocess.image_size, execution.batch_size)
            predicted = argmax_resized(logits, truth.shape[0], truth.shape[1]).cpu()
            confusion.add(truth, predicted)
            if pair.image.key in shown:
                of_segmenter[pair.image.key] = predicted.numpy().astype(np.int16)
        execution.advance(1)
    protocol = {
        "test_input": _test_input(preprocess.image_size),
        "val_images": len(whole.images),
        "preprocess": preprocess.to_json(),
    }
    return [
        Measured(one.features, one.classifier, {**one.protocol, **protocol}, confusion.scores(), of_one)
        for one, confusion, of_one in zip(segmenters, confusions, maps, strict=True)
    ]


def _test_input(size: int) -> str:
    return (
        f"shorter side {size}; windows of {size}x{size} with stride {_stride(size)}, logits averaged and resized to "
        "the mask; measured at the mask's size"
    )


def _stride(size: int) -> int:
    return max(1, int(size * STRIDE))


def windows(height: int, width: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields top and left of the windows of `size` x `size` that cover an image; the last ones end at its edges."""
    stride = _stride(size)
    for top in range(0, max(height - size + stride - 1, 0) // stride * stride + 1, stride):
        for left in range(0, max(width - size + stride - 1, 0) // stride * stride + 1, stride):
            yield min(top, height - size), min(left, width - size)


def _window_logits(segmenter: Segmenter, pair: MaskedImage, pixels: Tensor, size: int, batch: int) -> Tensor:
    """Logits (classes, height, width), means over the windows that a pixel is in; pixels (1, 3, height, width)."""
    height, width = pixels.shape[-2:]
    corners = list(windows(height, width, size))
    total: Tensor | None = None
    count = pixels.new_zeros(height, width)
    for start in range(0, len(corners), batch):
        part = corners[start : start + batch]
        crops = torch.cat([pixels[..., top : top + size, left : left + size] for top, left in part])
        logits = segmenter.logits([pair] * len(part), crops)
        total = pixels.new_zeros(logits.shape[1], height, width) if total is None else total
        for (top, left), of_window in zip(part, logits, strict=True):
            total[:, top : top + size, left : left + size] += of_window
            count[top : top + size, left : left + size] += 1
    assert total is not None
    return total / count


def argmax_resized(logits: Tensor, height: int, width: int) -> Tensor:
    """The class with the highest logit of (classes, h, w), resized to (height, width) int64, a few classes at a time:
    all of them together take gigabytes for a photograph and 150 classes."""
    best: Tensor | None = None
    found: Tensor | None = None
    for start in range(0, len(logits), _CLASSES_AT_ONCE):
        part = logits[None, start : start + _CLASSES_AT_ONCE]
        resized = interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[0]
        values, classes = resized.max(0)
        if best is None or found is None:
            best, found = values, classes
            continue
        found = torch.where(values > best, classes + start, found)
        best = torch.maximum(values, best)
    assert found is not None
    return found
