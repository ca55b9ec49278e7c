"""The images and masks of a segmentation, found and checked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...shared.runtime.console import progress
from ...shared.sources.options import SourceOptions
from .masked_images import (
    CheckedMasks,
    MaskedImage,
    Source,
    check_masks,
    masked_images,
    refuse_other_classes,
)
from .masks import MaskRule


@dataclass(frozen=True, eq=False)
class SegmentationData:
    """Training and validation images with their masks."""

    train: Sequence[MaskedImage]
    val: Sequence[MaskedImage]
    rule: MaskRule
    masks: CheckedMasks
    """Those of the training images."""
    classes: int
    """Every class index is lower."""

    @property
    def outputs(self) -> int:
        """How many classes can be learned: those with a name, or up to the highest one of the training masks."""
        return len(self.rule.names) if self.rule.names is not None else int(np.flatnonzero(self.masks.pixels)[-1]) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """The names of these classes, numbers where none are known."""
        return tuple(map(self.rule.name_of, range(self.outputs)))


def read_data(
    images: Source, val: Source, options: SourceOptions, mask_field: str, rule: MaskRule, workers: int
) -> SegmentationData:
    """Finds and checks all images and masks.

    Raises DataError and UsageError as `masked_images` and `check_masks` do, and DataError if no class of the validation
    masks is among the training masks.
    """
    train, test = (masked_images(source, options, mask_field) for source in (images, val))
    with progress("checking masks", len(train) + len(test), "masks") as advance:
        learned, measured = (check_masks(pairs, rule, workers, advance) for pairs in (train, test))
    refuse_other_classes(learned.pixels, measured.pixels, rule)
    classes = len(rule.names) if rule.names is not None else int(np.flatnonzero(learned.pixels + measured.pixels)[-1])
    return SegmentationData(train, test, rule, learned, classes + (rule.names is None))
