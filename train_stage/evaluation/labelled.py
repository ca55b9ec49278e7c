"""Labelled images for an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...shared.errors import DataError
from ...shared.labels.parsing import Label, sorted_labels
from ...shared.randomness import generator
from ...shared.sources.options import DEFAULT, SourceOptions
from ...shared.sources.records import ImageRecord
from ...shared.sources.sources import read_records
from .classes import named_labels, refuse_other_classes

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class LabelledImages:
    """Images in the order of their source, each with a class label."""

    records: Sequence[ImageRecord]
    classes: tuple[Label, ...] = ()
    """Class numbers or names; the label of an image is the index of its class. Those of the images, in order, unless
    they are given (`same_classes`)."""

    def __post_init__(self) -> None:
        if not self.classes:
            labels = [record.label for record in self.records if record.label is not None]
            object.__setattr__(self, "classes", tuple(sorted_labels(labels)))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> Tensor:
        """(n,) int64, indices of `classes`, on the CPU."""
        index = {label: number for number, label in enumerate(self.classes)}
        return torch.tensor([index[record.label] for record in self.records if record.label is not None])

    def subset(self, size: int) -> "LabelledImages":
        """At most `size` of the images, drawn by key and kept in their order."""
        drawn = sorted(range(len(self)), key=lambda index: generator("probe", self.records[index].key).random())[:size]
        return replace(self, records=[self.records[index] for index in sorted(drawn)])


def labelled_images(
    source: Source,
    options: SourceOptions = DEFAULT,
    *,
    labels: str | Path | None = None,
    label_field: str | None = None,
    classes: str | Path | None = None,
) -> LabelledImages:
    """The images of a source that `sources.open_source` opens with these options.

    Args:
        source: The images.
        options: Where keys end, and what is an image.
        labels: A list of their labels (`shared.labels.label_list`).
        label_field: The field of JSON members, or the column of the list, that holds the label.
        classes: A list of class names: line i, counted from 0, is the name of class number i.

    Raises:
        DataError if the source or a list cannot be read, or if any image has no label or a negative one.
    """
    records = read_records(source, options=options, labels=labels, label_field=label_field)
    found = [record.label for record in records if record.label is not None]
    if len(found) < len(records):
        raise DataError(
            f"{len(records) - len(found)} of the {len(records)} images in {source} have no label; add .cls members "
            "to the tars, or give class folders or --labels FILE."
        )
    negative = next((record for record in records if isinstance(record.label, int) and record.label < 0), None)
    if negative is not None:
        raise DataError(
            f"{negative.path}: image {negative.key!r} has class number {negative.label}, and class numbers count from "
            "0; give --labels FILE with the right ones."
        )
    if classes is not None:
        named = named_labels(found, classes, f"The images in {source}")
        records = [replace(record, label=label) for record, label in zip(records, named, strict=True)]
    return LabelledImages(records)


def labelled_pair(
    images: Source,
    val: Source,
    options: SourceOptions = DEFAULT,
    *,
    labels: str | Path | None = None,
    val_labels: str | Path | None = None,
    label_field: str | None = None,
    classes: str | Path | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """Training and validation images, whose classes are joined by name; arguments as in `labelled_images`.

    Raises:
        DataError as `labelled_images` does, and if their classes do not fit (`classes.refuse_other_classes`).
    """
    # A list of labels takes the place of JSON members; the field is then its column.
    train = labelled_images(images, options, labels=labels, label_field=label_field, classes=classes)
    test = labelled_images(val, options, labels=val_labels, label_field=label_field, classes=classes)
    return same_classes(train, test, numbers_are_given=classes is not None)


def same_classes(
    train: LabelledImages, val: LabelledImages, *, numbers_are_given: bool = False
) -> tuple[LabelledImages, LabelledImages]:
    """Both with the same `classes`, so that equal labels mean one class. Raises DataError as `labelled_pair` does."""
    if train.classes == val.classes:
        return train, val
    refuse_other_classes(train.classes, val.classes, numbers_are_given=numbers_are_given)
    union = tuple(sorted_labels([*train.classes, *val.classes]))
    return replace(train, classes=union), replace(val, classes=union)
