"""Text of unknown origin (keys, class names, paths, messages of servers) as text that is safe to print.

Control characters and escape sequences can move the cursor, rewrite what was printed and change a terminal's title;
marks of direction make a name read as another one. All of them are shown as Python's escapes (`\\x1b`, `\\u202e`).
"""

import json
import unicodedata
from typing import Any

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control and format characters, surrogates, line and paragraph separators."""
_JOINERS = "\u200c\u200d"
"""Format characters that are part of ordinary words (Persian, the languages of India) and of emoji."""


def printable(text: str) -> str:
    """`text` on one line, with every control or invisible character as an escape.

    Printable text comes back as it is, and so does the result of an earlier call. Surrogates, which stand for the bytes
    of a file name that is not UTF-8, become escapes as well, so the result can always be encoded as UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(character) if _is_hidden(character) else character for character in text)


def printable_values(value: Any) -> Any:
    """JSON values in which every string, names included, is `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_values(name): printable_values(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [printable_values(entry) for entry in value]
    return value


def printable_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON whose hidden characters are JSON escapes: safe to print, and read back as the very same value."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        json.dumps(character)[1:-1] if character != "\n" and _is_hidden(character) else character for character in text
    )


def _is_hidden(character: str) -> bool:
    if character.isprintable() or character in _JOINERS:
        return False
    return unicodedata.category(character) in _HIDDEN


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
