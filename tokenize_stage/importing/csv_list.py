"""Reads a CSV that names the images of an array's rows, and finds the row of each key."""

import csv
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...shared.errors import DataError
from ...shared.sources.keys import FIRST_DOT, key_of

COLUMNS = ("path", "file", "filename", "image", "key")
Named = tuple[int, str]
"""(line in the CSV, name of an image)"""


def read_listing(file: Path, rows: int) -> list[Named]:
    """The images that a CSV names.

    The first line is a header if it contains one of `COLUMNS`, or if there is one line more than `rows`. Raises
    DataError for a file that is not a CSV in UTF-8 or has too few columns.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            reader = csv.reader(opened)
            lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except OSError as error:
        raise DataError(f"--csv {file} cannot be read ({error.strerror}).") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"--csv {file} is not a CSV in UTF-8 ({error}).") from None
    header = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    column = next((header.index(name) for name in COLUMNS if name in header), None)
    if column is not None or len(lines) == rows + 1:
        lines = lines[1:]
    column = column or 0
    short = next((number for number, line in lines if len(line) <= column), None)
    if short is not None:
        raise DataError(f"--csv {file} has no column {column + 1} in line {short}.")
    return [(number, line[column].strip()) for number, line in lines]


def _spellings(name: str, root: Path | None, until: str) -> Iterator[str]:
    """Yields the keys that a name in a list may refer to."""
    yield name
    yield key_of(name, until)
    yield key_of(posixpath.normpath(name), until)
    if root is not None:
        yield key_of(os.path.relpath(name, root), until)


def rows_of_keys(
    named: Sequence[Named], keys: Sequence[str], root: Path | None, listing: Path, until: str = FIRST_DOT
) -> dict[str, int]:
    """The row of each key.

    Args:
        named: the images that the rows belong to.
        keys: the keys of the source.
        root: the folder of the source, to which paths may be relative; None for tars.
        listing: the CSV, for messages.
        until: where keys end in file names.

    Raises:
        DataError: an image is missing, foreign or named twice.
    """
    known = set(keys)
    row_of: dict[str, int] = {}
    foreign = []
    for row, (line, name) in enumerate(named):
        key = next((key for key in _spellings(name, root, until) if key in known), None)
        if key is None:
            foreign.append(name)
        elif key in row_of:
            raise DataError(f"--csv {listing} names image {key!r} in lines {named[row_of[key]][0]} and {line}.")
        else:
            row_of[key] = row
    missing = [key for key in keys if key not in row_of]
    if foreign:
        raise DataError(f"--csv {listing} names {_examples(foreign)} not in --images.")
    if missing:
        raise DataError(f"--images holds {_examples(missing)} not in --csv {listing}.")
    return row_of


def _examples(names: Sequence[str]) -> str:
    examples = ", ".join(map(repr, names[:3]))
    return f"{len(names)} image(s) ({examples}{' ...' if len(names) > 3 else ''}) that are"
