"""Class names and labels: which output of a classifier an image's label is."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...shared.errors import DataError
from ...shared.images.keys import EXTENSIONS, extension_of
from ...shared.images.records import ImageRecord

Label = int | str
_MOST_NUMBERED_CLASSES = 100_000


def label_of(record: ImageRecord) -> Label | None:
    """The label of an image: the name of its class folder, or the number beside it in a tar; None without one."""
    if record.label is not None and extension_of(record.path.name) in EXTENSIONS:
        return record.key.split("/")[0]
    return record.label


def labels_of(records: Sequence[ImageRecord], source: object) -> list[Label]:
    """The labels of all images of `source`. Raises DataError if one has none."""
    labels = [label_of(record) for record in records]
    missing = [record.key for record, label in zip(records, labels, strict=True) if label is None]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(records)} images in {source} have no label, such as {missing[0]!r}; give "
            "class folders, or tars with .cls members."
        )
    return [label for label in labels if label is not None]


def class_names(labels: Sequence[Label], source: object) -> tuple[str, ...]:
    """The names of the classes of training images, in the order of the head's outputs.

    Names are sorted. Numbers count from 0 to the largest one, so that a class without images keeps its number. Raises
    DataError for numbers that are negative or too large to be those of classes.
    """
    if any(isinstance(label, str) for label in labels):
        return tuple(sorted({str(label) for label in labels}))
    numbers = [int(label) for label in labels]
    if min(numbers) < 0 or max(numbers) >= _MOST_NUMBERED_CLASSES:
        wrong = min(numbers) if min(numbers) < 0 else max(numbers)
        raise DataError(f"{source} has label {wrong}; number the classes from 0 to {_MOST_NUMBERED_CLASSES - 1:,}.")
    return tuple(map(str, range(max(numbers) + 1)))


def class_indices(labels: Sequence[Label], names: Sequence[str], source: object) -> NDArray[np.int64]:
    """(n,) int64: the position among `names` of each label.

    A label is looked up by its name. Where classes have only numbers for names, as many class folders as there are
    classes are taken in sorted order; where they have names, numbers are positions. Raises DataError, which lists
    them, for labels that are none of the classes.
    """
    positions = {name: position for position, name in enumerate(names)}
    distinct = sorted(set(labels), key=str)
    numbered = all(name.isdecimal() for name in names)
    if numbered and len(distinct) == len(names) and all(isinstance(label, str) for label in distinct):
        if any(label not in positions for label in distinct):
            positions = {str(label): position for position, label in enumerate(distinct)}
    elif not numbered and all(isinstance(label, int) and 0 <= label < len(names) for label in distinct):
        positions = {str(position): position for position in range(len(names))}
    unknown = [str(label) for label in distinct if str(label) not in positions]
    if unknown:
        raise DataError(
            f"{source} has {len(unknown)} classes that the model does not have ({_some(unknown)}); it has {len(names)} "
            f"({_some(names)}). Give images of these classes, or class folders with these names."
        )
    return np.array([positions[str(label)] for label in labels], dtype=np.int64)


def read_class_list(path: str | Path, names: Sequence[str]) -> list[int]:
    """The outputs that a list of classes selects: a text file with a class name, or an output's number, per line.

    Raises DataError if the file cannot be read, is empty, or lists something twice or that the model does not have.
    """
    try:
        entries = [line.split("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}).") from None
    entries = [entry for entry in entries if entry]
    positions = {name: position for position, name in enumerate(names)}
    chosen = [positions.get(entry, int(entry) if entry.isdecimal() else -1) for entry in entries]
    wrong = [entry for entry, position in zip(entries, chosen, strict=True) if not 0 <= position < len(names)]
    if wrong or not chosen:
        raise DataError(
            f"{path} lists {wrong[0]!r}, which is none of the {len(names)} classes of the model ({_some(names)})."
            if wrong
            else f"{path} lists no classes; write one per line."
        )
    if len(set(chosen)) < len(chosen):
        raise DataError(f"{path} lists a class twice; name each one once.")
    return chosen


def labels_sha256(keys: Sequence[str], labels: Sequence[Label]) -> str:
    """Hex SHA-256 of the label of each key, in any order."""
    lines = sorted(f"{key}\t{label}" for key, label in zip(keys, labels, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
