"""A label is a class number or a class name. The name is what identifies a class in two sources."""

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

Label = int | str
"""A class number, or the name of a class. A name that is a decimal number, as of the folder `3`, is that number."""
LONGEST_LABEL = 1024
"""Most bytes of a label's text."""
_NUMBER = re.compile(r"[+-]?[0-9]+")
_NUMBERS = re.compile(r"[-+0-9.,;\s]+")
_LARGEST = np.iinfo(np.int64)


def parse_label(text: str | bytes) -> Label:
    """The label that a text states, such as the content of a `.cls` member or a line of a list.

    Raises ValueError, with the reason in words, for a text that is empty, is not one line of UTF-8, is longer than
    1,024 bytes, or is a number beyond 64 bits, a fraction or several numbers.
    """
    if len(text) > LONGEST_LABEL:
        raise ValueError(f"longer than {LONGEST_LABEL:,} bytes")
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            raise ValueError("not UTF-8") from None
    text = text.removeprefix("\ufeff").strip()
    if not text:
        raise ValueError("empty")
    if any(character < " " or character == "\x7f" for character in text):
        raise ValueError("not one line of text")
    if not _NUMBER.fullmatch(text):
        if _NUMBERS.fullmatch(text):
            raise ValueError("neither one whole number nor a name")
        return text
    number = int(text) if len(text) < 32 else _LARGEST.max + 1
    if not _LARGEST.min <= number <= _LARGEST.max:
        raise ValueError("a number beyond 64 bits")
    return number


def stored_label(content: bytes) -> Label:
    """The label in a `.cls` member of a token store: a name as it was. Raises ValueError if it is damaged."""
    text = content.decode()
    return parse_label(text) if _NUMBER.fullmatch(text) else text


def label_of_name(name: str) -> Label:
    """The label that a folder's or a tar's name states: the name, or the number that it is without leading zeros."""
    if name.isascii() and name.isdigit() and len(name) < 19 and str(int(name)) == name:
        return int(name)
    return name


def label_of_json(content: bytes, field: str) -> Label:
    """The label in a field of a JSON object; `a.b` is field b of the object in field a.

    Raises ValueError, with the reason in words, if there is no such field or its value is neither a whole number nor a
    text.
    """
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if isinstance(value, dict) and field in value:
        return label_of_value(value[field])
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"without the field {field!r}")
        value = value[name]
    return label_of_value(value)


def label_of_value(value: Any) -> Label:
    """The label that a value of JSON states. Raises ValueError as `label_of_json` does."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{json.dumps(value)[:40]}, neither a whole number nor a text")
    return parse_label(str(value))


def sorted_labels(labels: Iterable[Label]) -> list[Label]:
    """Different labels in order: numbers by value, then names by code point."""
    return sorted(set(labels), key=lambda label: (isinstance(label, str), label))
