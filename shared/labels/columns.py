"""Labels as a column of numbers, and the names that the numbers stand for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .parsing import Label

NO_LABEL = -1


def to_column(labels: Sequence[Label | None]) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """Labels (n,) int64, -1 for none, and the sorted class names that they are indices of.

    The names are None if all labels are numbers, which are then stored as they are. Beside names, numbers are names.
    """
    if not any(isinstance(label, str) for label in labels):
        return np.array([NO_LABEL if label is None else label for label in labels], dtype=np.int64), None
    names = [None if label in (None, NO_LABEL) else str(label) for label in labels]
    classes = tuple(sorted({name for name in names if name is not None}))
    index = {name: number for number, name in enumerate(classes)}
    return np.array([NO_LABEL if name is None else index[name] for name in names], dtype=np.int64), classes


def from_column(number: Any, classes: Sequence[str] | None) -> Label | None:
    """The label behind one number of a column; None for -1."""
    index = int(number)
    if index == NO_LABEL:
        return None
    return index if classes is None else classes[index]
