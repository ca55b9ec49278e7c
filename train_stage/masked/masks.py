"""Masks: PNG files of one channel, whose pixels are class indices."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...shared.errors import DataError, UsageError
from ...shared.images.decode import decoding, open_image
from ...shared.labels.class_names import read_class_names
from ...shared.sources.records import ImageRecord, read_bytes

IGNORED = -1
"""The class index of pixels that are neither learned from nor measured."""
HIGHEST = 4_095
"""The largest class index: more would make a confusion matrix of gigabytes, and are instances rather than classes."""
_ONE_CHANNEL = ("1", "L", "P", "I;16", "I")
_DEPTH, _COLOUR_TYPE, _GREY = 24, 25, 0
"""Where the header of a PNG states its bit depth and colour type, and the type of grey images."""


@dataclass(frozen=True)
class MaskRule:
    """What the pixels of masks mean: which values are ignored, and the names of the others.

    Raises UsageError for a negative value.
    """

    ignore: tuple[int, ...] = (255,)
    names: tuple[str, ...] | None = None
    """The name of each class index, from 0; None if only indices are known."""
    file: Path | None = None
    """Where the names were read from."""

    def __post_init__(self) -> None:
        negative = next((value for value in self.ignore if value < 0), None)
        if negative is not None:
            raise UsageError(f"--ignore {negative} must be a value that a pixel of a mask can have, from 0.")

    @classmethod
    def read(cls, ignore: tuple[int, ...], classes: str | Path | None) -> "MaskRule":
        """The rule with the class names in the file `classes`. Raises DataError if they cannot be read."""
        if classes is None:
            return cls(ignore)
        return cls(ignore, tuple(read_class_names(Path(classes))), Path(classes))

    def name_of(self, index: int) -> str:
        return str(index) if self.names is None else self.names[index]


def read_mask(record: ImageRecord, rule: MaskRule) -> NDArray[np.int16]:
    """The class index of each pixel, (height, width), `IGNORED` where the rule says so.

    Raises DataError, which names the mask, for one that cannot be decoded or is no PNG of one channel, and for a class
    index without a name or above `HIGHEST`.
    """
    name = name_of_mask(record)
    values = _pixels(record, name)
    values[np.isin(values, rule.ignore)] = IGNORED
    highest = int(values.max())
    if rule.names is not None and highest >= len(rule.names):
        raise DataError(
            f"{name} has class index {highest}, and {rule.file} names classes 0 to {len(rule.names) - 1}; give the "
            f"list of these classes, or --ignore {highest}."
        )
    if highest > HIGHEST:
        raise DataError(
            f"{name} has class index {highest:,}, more than {HIGHEST:,}; give a mask of classes (of instances, or of "
            f"colours, it cannot be read), or --ignore {highest}."
        )
    return values.astype(np.int16)


def name_of_mask(record: ImageRecord) -> str:
    """What messages call a mask."""
    return f"{record.path}: the mask of {record.key!r}"


def _pixels(record: ImageRecord, name: str) -> NDArray[np.int32]:
    data = read_bytes(record)
    with decoding(data, name):
        image = open_image(data, record.max_pixels)
        fits = image.format == "PNG" and image.mode in _ONE_CHANNEL
        values = np.array(image, dtype=np.int32) if fits else None
    if values is None:
        raise DataError(
            f"{name} is a {image.format} of mode {image.mode}; a mask is a PNG with one channel of class indices, grey "
            "or with a palette."
        )
    if data[_COLOUR_TYPE] == _GREY and data[_DEPTH] in (2, 4):
        values //= 255 // (2 ** data[_DEPTH] - 1)  # Pillow spreads grey values of 2 and 4 bits from 0 to 255
    return values
