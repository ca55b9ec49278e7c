"""Renders this project's docstrings: prose with sections such as `Args:`, whose entries become a Markdown list."""

import inspect
import re
from typing import Any

from griffe import Extension, Object

SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes")
_NAMES = re.compile(r"([\w*]+(?:, [\w*]+)*): ")


def as_markdown(docstring: str) -> str:
    """The docstring with each section as a bold title and a list of its entries, or a paragraph where it has none."""
    lines: list[str] = []
    section: list[str] | None = None
    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        if section is not None and line and not line.startswith(" "):
            lines += [*_entries(section), ""]
            section = None
        if line.removesuffix(":") in SECTIONS and line.endswith(":"):
            section = []
            lines += ["", f"**{line}**", ""]
        elif section is None:
            lines.append(line)
        else:
            section.append(line)
    return "\n".join([*lines, *_entries(section or [])])


def _entries(section: list[str]) -> list[str]:
    lines = inspect.cleandoc("\n".join(section)).splitlines()
    entries = []
    for line in lines:
        names = _NAMES.match(line)
        entries.append(f"- `{names[1]}`: {line[names.end() :]}" if names else line)
    return entries


class DocstringSections(Extension):
    """Griffe extension: rewrites every docstring of the package."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
