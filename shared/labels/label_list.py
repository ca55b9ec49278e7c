"""Lists of labels: one label a line in the order of the images' keys, or lines that name their image."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .class_names import read_lines
from .parsing import Label, label_of_value, parse_label

KEY_COLUMNS = ("key", "path", "file", "filename", "file_name", "image", "imageid", "image_id", "name", "__key__")
LABEL_COLUMNS = ("label", "class", "cls", "class_name", "class_id", "synset", "wnid", "target", "category")
_FILE_AND_LABEL = re.compile(r"(\S+\.(?:jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|avif|jp2))[\s,;]+(\S.*)", re.IGNORECASE)
"""A line such as `ILSVRC2012_val_00000001.JPEG 65`."""


@dataclass(frozen=True)
class LabelList:
    """The labels of a list, in its order."""

    file: Path
    labels: list[Label]
    names: list[str] | None
    """The image that each line names; None if the lines are those of all images in the order of their keys."""

    def by_key(self, keys: Sequence[str], key_of: Callable[[str], str]) -> dict[str, Label]:
        """The label of each of `keys` that has one.

        `key_of` returns the key of a file's name. An image is named by its key, by its path or by the base name of its
        file. Raises DataError if the number of lines is not that of the keys, where the lines name no images, or if an
        image has two different labels.
        """
        if self.names is None:
            if len(keys) != len(self.labels):
                raise DataError(
                    f"{self.file} has {len(self.labels):,} lines and there are {len(keys):,} images; give one label a "
                    "line in the sorted order of the images, or a list with a key column."
                )
            return dict(zip(sorted(keys), self.labels, strict=True))
        exact = _Spelled(self.file)
        base = _Spelled(self.file)
        for line, (name, label) in enumerate(zip(self.names, self.labels, strict=True), 1):
            for spelled in dict.fromkeys((name, key_of(name), key_of(name.removeprefix("./")))):
                exact.add(spelled, label, line)
            base.add(key_of(name).rpartition("/")[2], label, line)
        labels = {key: exact.get(key) for key in keys}
        missing = [key for key, label in labels.items() if label is None]
        bases = [key.rpartition("/")[2] for key in keys]
        if missing and len(set(bases)) == len(bases):
            labels |= {key: base.get(key.rpartition("/")[2]) for key in missing}
        return {key: label for key, label in labels.items() if label is not None}


class _Spelled:
    """Labels by one spelling of their image's name. Two labels for one are an error only if they are asked for."""

    def __init__(self, file: Path):
        self._file = file
        self._labels: dict[str, tuple[Label, int]] = {}
        self._doubled: dict[str, int] = {}

    def add(self, name: str, label: Label, line: int) -> None:
        if self._labels.setdefault(name, (label, line))[0] != label:
            self._doubled.setdefault(name, line)

    def get(self, name: str) -> Label | None:
        if name in self._doubled:
            first, second = self._labels[name][1], self._doubled[name]
            raise DataError(
                f"{self._file} has two labels for {name!r}, entries {first} and {second}; keep one of them."
            )
        found = self._labels.get(name)
        return None if found is None else found[0]


def read_label_list(file: Path, field: str | None = None) -> LabelList:
    """Reads a list of labels.

    It is one of these, in UTF-8: JSON lines, or a CSV with a header, with a key column (`KEY_COLUMNS`) and a label
    column (`field`, or one of `LABEL_COLUMNS`); lines of a file's name and a label; or one label a line. Raises
    DataError for anything else, and for an empty line between labels.
    """
    lines = read_lines(file)
    if not lines:
        raise DataError(f"{file} holds no labels.")
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if empty is not None:
        raise DataError(f"{file} has an empty line {empty} between labels; every line must hold a label.")
    if lines[0].lstrip().startswith("{"):
        return _from_json_lines(file, lines, field)
    header = [cell.strip().lower() for cell in next(csv.reader(lines[:1], delimiter=_delimiter(lines[0])))]
    if len(header) > 1 and any(name in header for name in KEY_COLUMNS):
        return _from_csv(file, lines, field)
    pairs = [_FILE_AND_LABEL.fullmatch(line.strip()) for line in lines]
    if all(pairs):
        labels = [_label(file, number, pair[2], parse_label) for number, pair in enumerate(pairs, 1) if pair]
        return LabelList(file, labels, [pair[1] for pair in pairs if pair])
    return LabelList(file, [_label(file, number, line, parse_label) for number, line in enumerate(lines, 1)], None)


def _label(file: Path, line: int, value: Any, parse: Callable[[Any], Label]) -> Label:
    try:
        return parse(value)
    except ValueError as error:
        raise DataError(f"{file} has an unreadable label in line {line} ({error}).") from None


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _from_csv(file: Path, lines: list[str], field: str | None) -> LabelList:
    reader = csv.DictReader(io.StringIO("\n".join(lines)), delimiter=_delimiter(lines[0]))
    try:
        rows = [(reader.line_num, {(name or "").strip(): cell for name, cell in row.items()}) for row in reader]
    except csv.Error as error:
        raise DataError(f"{file} is not a CSV ({error}).") from None
    names = [name.strip() for name in reader.fieldnames or ()]
    return _from_rows(file, names, rows, field, parse_label)


def _from_json_lines(file: Path, lines: list[str], field: str | None) -> LabelList:
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{file} has no JSON object in line {number}; JSON lines need one a line.")
        rows.append((number, row))
    return _from_rows(file, list(rows[0][1]), rows, field, label_of_value)


def _from_rows(
    file: Path,
    columns: list[str],
    rows: list[tuple[int, dict[str, Any]]],
    field: str | None,
    parse: Callable[[Any], Label],
) -> LabelList:
    key = _column(columns, KEY_COLUMNS)
    label = field if field is not None else _column([name for name in columns if name != key], LABEL_COLUMNS)
    if key is None or label is None or label not in columns:
        wanted = "key" if key is None else "label"
        choices = KEY_COLUMNS if key is None else (field,) if field else LABEL_COLUMNS
        raise DataError(
            f"{file} has no {wanted} column (its columns are {', '.join(columns)}); name it {' or '.join(choices[:4])}"
            f"{'' if key is None or field else ', or give --label-field'}."
        )
    short = next(
        (line for line, row in rows if not isinstance(row.get(key), str | int) or row.get(label) is None), None
    )
    if short is not None:
        raise DataError(f"{file} has no {key} or no {label} in line {short}.")
    labels = [_label(file, line, row[label], parse) for line, row in rows]
    return LabelList(file, labels, [str(row[key]).strip() for _, row in rows])


def _column(columns: Sequence[str], known: Sequence[str]) -> str | None:
    return next((column for name in known for column in columns if column.lower() == name), None)
