"""The logits of a classifier on images."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...shared.errors import DataError
from ...shared.images.keys import EXTENSIONS, extension_of, key_of
from ...shared.images.records import ImageRecord
from ...shared.images.sources import read_records
from ...shared.images.views import Preprocess
from ..evaluation.embed import Execution, normalised_views
from ..weights.read import load_weights
from ..weights.weights import Weights

DEFAULT_CROP = 0.9
"""Where weights do not say which share of the image their evaluation crops: that of the published protocol."""


def load_classifier(path: str | Path, image_size: int | None = None) -> Weights:
    """The weights of a classifier. Raises DataError as `load_weights` does, and for weights without a head."""
    weights = load_weights(path)
    if weights.kind != "classifier":
        raise DataError(
            f"{path} has no head to classify with (its kind is {weights.kind}); fine-tune it first (mapet train "
            "finetune), or measure its features (mapet train probe)."
        )
    return weights.resized(image_size)


def evaluation_preprocess(weights: Weights, crop: float | None) -> Preprocess:
    """Resizes the shorter side to floor(size / crop) and crops the centre, as timm does.

    `crop` is the weights' own if it is None, or `DEFAULT_CROP` if they have none.
    """
    share = crop or weights.input.crop_pct or DEFAULT_CROP
    return replace(weights.preprocess, resize_size=math.floor(weights.shape.image_size / share))


@torch.no_grad()
def classify(
    weights: Weights, records: Sequence[ImageRecord], execution: Execution, crop: float | None = None
) -> Tensor:
    """Logits (n, classes) float32 on the CPU, in full float32 precision. Raises DataError for an unreadable image."""
    model = weights.vit().to(execution.device)
    preprocess, parts = evaluation_preprocess(weights, crop), []
    views = normalised_views(records, preprocess, execution.batch_size, execution.workers, execution.device)
    for images in views:
        parts.append(logits_of(model, images).cpu())
        execution.advance(len(images))
    return torch.cat(parts)


def logits_of(model: torch.nn.Module, images: Tensor) -> Tensor:
    """The logits (B, classes) of normalised images (B, 3, S, S), in full float32 precision."""
    # cuDNN would otherwise round float32 to TF32.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        logits: Tensor = model(images)
    return logits


def read_images(images: str | Path | Sequence[str | Path]) -> list[ImageRecord]:
    """The records of image files, or of any source of images.

    Raises DataError for files that cannot be read, and as `read_records` does.
    """
    places = [images] if isinstance(images, str | Path) else list(images)
    if not places or not all(extension_of(str(place)) in EXTENSIONS for place in places):
        return read_records(places[0] if len(places) == 1 else places)
    return [_file_record(Path(place)) for place in places]


def _file_record(path: Path) -> ImageRecord:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give images, a tar or a folder.")
    return ImageRecord(key_of(path.name), path, 0, path.stat().st_size, None, extension_of(path.name))
