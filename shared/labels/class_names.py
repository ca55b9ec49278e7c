"""Lists of class names: line i, counted from 0, is the name of class i."""

from pathlib import Path

from ..errors import DataError
from .parsing import Label

BESIDE_TARS = "classes.txt"
"""The file beside tars that names their classes."""


def read_class_names(file: Path) -> list[str]:
    """The names of classes 0, 1, ..., one a line; empty lines at the end are ignored.

    Raises DataError for a file that cannot be read, is not UTF-8, has an empty line before its last name, or has one
    name twice.
    """
    names = [line.strip() for line in read_lines(file)]
    if not names:
        raise DataError(f"{file} holds no class names; it needs one a line, the first for class 0.")
    lines: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{file} has an empty line {number}; line {number} is the name of class {number - 1}.")
        if name in lines:
            raise DataError(
                f"{file} has the name {name!r} in lines {lines[name]} and {number}; give every class a name of its own."
            )
        lines[name] = number
    return names


def name_of(label: Label, names: list[str], file: Path) -> str:
    """The name of class `label`; a name stays as it is. Raises ValueError, in words, for a number without a line."""
    if isinstance(label, str):
        return label
    if not 0 <= label < len(names):
        raise ValueError(f"class {label}, and {file} names classes 0 to {len(names) - 1}")
    return names[label]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file in UTF-8, without empty ones at its end. Raises DataError if it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not a text file in UTF-8 (byte {error.start}).") from None
    lines = text.splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    return lines
