"""Segmentations whose encoder stays as it is: classifiers of patches, and a linear head."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from ...shared.runtime.console import progress
from ..evaluation.embed import Execution
from ..masked.crops import RandomCrops, WholeImages
from ..masked.data import SegmentationData
from ..weights.weights import Weights
from .linear_head import LinearSegmenter, Training, train_head
from .patch_classifiers import FITS, PatchNeighbours, PatchRegression
from .patches import PatchEncoder, SquashedImages, patch_sets
from .pixel_classifier import measure as measure_patches
from .scores import Measured
from .sliding import measure


def classify_patches(
    weights: Weights,
    encoders: Sequence[PatchEncoder],
    data: SegmentationData,
    most: int,
    shown: Collection[str],
    execution: Execution,
) -> list[Measured]:
    """Logistic regression and k-NN of each encoder's patches, of which `most` are kept in training; `shown` are keys
    whose predictions are kept."""
    train, val = (SquashedImages.of(pairs, data.rule, weights) for pairs in (data.train, data.val))
    with progress("extracting features", len(data.train)) as advance:
        patches = patch_sets(encoders, train, data.classes, most, _with(execution, advance))
    with progress("fitting classifiers", FITS * len(encoders), "fits") as advance:
        fitted = [
            (encoder, (PatchRegression(of, advance), PatchNeighbours(of, advance)))
            for encoder, of in zip(encoders, patches, strict=True)
        ]
    with progress("measuring", len(data.val)) as advance:
        return measure_patches(fitted, val, data.classes, shown, _with(execution, advance))


def linear_heads(
    weights: Weights,
    encoders: Sequence[PatchEncoder],
    data: SegmentationData,
    training: Training,
    shown: Collection[str],
    execution: Execution,
) -> list[Measured]:
    """A linear head on each encoder; `shown` are keys whose predictions are kept."""
    crops, size = RandomCrops(data.train, data.rule, weights.preprocess, training.seed), weights.shape.image_size
    with progress("training", training.iterations * len(encoders), "steps") as advance:
        heads = [
            LinearSegmenter(
                encoder, train_head(encoder, crops, data.classes, training, _with(execution, advance)), size, training
            )
            for encoder in encoders
        ]
    whole = WholeImages(data.val, data.rule, weights.preprocess)
    with progress("measuring", len(data.val)) as advance:
        return measure(heads, whole, data.classes, shown, _with(execution, advance))


def _with(execution: Execution, advance: Callable[[int], Any]) -> Execution:
    return replace(execution, advance=advance)
