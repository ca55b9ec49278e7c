"""Classes of two sets of images, joined by name: what must be equal, what may differ, and how both are numbered."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...shared.errors import DataError
from ...shared.labels.class_names import name_of, read_class_names
from ...shared.labels.parsing import Label, sorted_labels
from ...shared.runtime.console import say

_NAMED = 3
"""How many classes a message names."""


def number_classes(labels: Tensor, test_labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Labels (n,) and (m,) int64 as numbers of the classes that occur in either, from 0 on, and how many there are.

    Raises DataError for a negative label.
    """
    both = torch.cat([labels, test_labels])
    if len(both) and int(both.min()) < 0:
        raise DataError(f"Label {int(both.min())} is negative; class numbers count from 0.")
    classes, numbers = torch.unique(both, return_inverse=True)
    return numbers[: len(labels)], numbers[len(labels) :], len(classes)


def named_labels(labels: Sequence[Label], file: str | Path, place: str) -> list[Label]:
    """Labels with the names that the list `file` gives class numbers (line i, from 0, is the name of class i).

    Raises DataError for a list that cannot be read, or that has no line for a number; `place` names the images.
    """
    path = Path(file)
    names = read_class_names(path)
    try:
        return [name_of(label, names, path) for label in labels]
    except ValueError as error:
        raise DataError(f"{place} have {error}; give the list of these classes.") from None


def refuse_other_classes(train: Collection[Label], val: Collection[Label], *, numbers_are_given: bool = False) -> None:
    """Checks that validation images have classes of the training images, and prints in what their classes differ.

    `numbers_are_given` says that a list of class names was given, so that numbers mean what they say. Raises DataError
    if one set has numbers and the other names, if no class is in both, or if all numbers are shifted by one.
    """
    train, val = set(train), set(val)
    numbers = [all(isinstance(label, int) for label in labels) for labels in (train, val)]
    if numbers[0] != numbers[1] and not train & val:
        sides = ["numbers" if of_side else "names" for of_side in numbers]
        raise DataError(
            f"The training images have class {sides[0]} ({some_classes(train)}) and the validation images class "
            f"{sides[1]} ({some_classes(val)}); give --classes FILE (probe.classes) with the name of class i in line "
            "i, counted from 0."
        )
    if all(numbers) and not numbers_are_given and not val <= train:
        shift = next((step for step in (1, -1) if {int(label) - step for label in val} <= train), None)
        if shift:
            raise DataError(
                f"The classes of the validation images ({_range(val)}) are those of the training images "
                f"({_range(train)}) {'plus' if shift > 0 else 'minus'} one, as if one of them counted from 1; give the "
                "right numbers with --val-labels FILE or --labels FILE, or --classes FILE if these are right."
            )
    if not train & val:
        raise DataError(
            f"No class of the validation images ({some_classes(val)}) is one of the training images "
            f"({some_classes(train)}); give images with the same classes."
        )
    for missing, have, lack, effect in (
        (val - train, "validation", "training", "; their images count as wrong"),
        (train - val, "training", "validation", ""),
    ):
        if missing:
            say(
                f"{len(missing)} of the {len(val if have == 'validation' else train)} classes of the {have} images are "
                f"not among the {lack} images ({some_classes(missing)}){effect}."
            )


def some_classes(labels: Collection[Label]) -> str:
    """The first few of some classes in order, for a message."""
    ordered = sorted_labels(labels)
    return ", ".join(str(label) for label in ordered[:_NAMED]) + (" ..." if len(ordered) > _NAMED else "")


def _range(labels: Collection[Label]) -> str:
    ordered = sorted_labels(labels)
    return f"{ordered[0]} to {ordered[-1]}"
