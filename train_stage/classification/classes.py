"""The outputs of a classifier: one for each class of the training images, and which one an image's label is."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...shared.errors import DataError, UsageError
from ...shared.labels.parsing import Label, sorted_labels
from ...shared.sources.records import ImageRecord
from ..evaluation.classes import some_classes

_MOST_OUTPUTS = 100_000


def labels_of(records: Sequence[ImageRecord]) -> list[Label]:
    """The label of each of the records, which all have one (`evaluation.labelled.labelled_images`)."""
    return [record.label for record in records if record.label is not None]


def output_names(labels: Sequence[Label], outputs: int | None = None) -> tuple[str, ...]:
    """The class name of each output, from the labels of the training images.

    Names are sorted. Class numbers count from 0 to the largest one, so that a class without images keeps its number.
    `outputs` asks for further outputs, which are named "unused 12" and so on.

    Raises:
        DataError for a class number that is too large; UsageError for fewer `outputs` than there are classes.
    """
    names = [str(label) for label in sorted_labels(labels)]
    if all(isinstance(label, int) for label in labels):
        largest = max(int(label) for label in labels)
        if largest >= _MOST_OUTPUTS:
            raise DataError(
                f"The training images have class number {largest}; give --labels FILE with numbers from 0 to "
                f"{_MOST_OUTPUTS - 1:,}, or with names."
            )
        names = [str(number) for number in range(largest + 1)]
    if outputs is not None and outputs < len(names):
        raise UsageError(f"model.classes {outputs} is fewer than the {len(names)} classes of the images; leave it out.")
    return (*names, *(f"unused {number}" for number in range(len(names), outputs or 0)))


def unknown_labels(labels: Sequence[Label], names: Sequence[str]) -> list[Label]:
    """The different labels that are none of the outputs `names`, in order."""
    known = set(names)
    return sorted_labels([label for label in labels if str(label) not in known])


def output_indices(labels: Sequence[Label], names: Sequence[str]) -> NDArray[np.int64]:
    """(n,) int64: the output of each label. Raises DataError for labels that are none of the classes."""
    positions = {name: position for position, name in enumerate(names)}
    unknown = unknown_labels(labels, names)
    if unknown:
        raise DataError(
            f"{len(unknown)} classes of the validation images are not among the training images "
            f"({some_classes(unknown)}); give validation images of the training images' classes."
        )
    return np.array([positions[str(label)] for label in labels], dtype=np.int64)


def labels_sha256(names: Sequence[str], keys: Sequence[str], labels: Sequence[Label]) -> str:
    """Hex SHA-256 of the class names in order, and of the label of each key in any order of the keys."""
    lines = sorted(f"{key}\t{label}" for key, label in zip(keys, labels, strict=True))
    return hashlib.sha256("\0".join([*names, *lines]).encode()).hexdigest()
