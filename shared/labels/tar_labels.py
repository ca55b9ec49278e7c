"""Labels in a tar: `.cls` members, or a field of `.json` members; `classes.txt` beside the tar names class numbers."""

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from .class_names import BESIDE_TARS, name_of, read_class_names
from .parsing import LONGEST_LABEL, Label, label_of_json, parse_label

_LONGEST_JSON = 1 << 24
"""Bytes of a .json member that are read."""


class TarLabels:
    """Reads the labels of one tar; what cannot be read is listed.

    Raises DataError if `classes.txt` beside the tar is not a list of class names.
    """

    def __init__(self, tar: Path, field: str | None = None):
        """`field` is the field of the JSON members that holds the label; without it, labels are `.cls` members."""
        self.field = field
        self.problems: list[tuple[str, str]] = []
        """(key, reason) of each label that could not be read."""
        self._list = tar.parent / BESIDE_TARS
        self.class_names = read_class_names(self._list) if os.path.isfile(self._list) else None
        """Of `classes.txt` beside the tar."""

    def is_label(self, member: tarfile.TarInfo, key: str) -> bool:
        """Whether a member holds the label of the image of this key."""
        if self.field is None:
            return member.isfile() and member.name.lower().endswith(".cls")
        return member.isfile() and member.name[len(key) :].lower() == ".json"

    def read(
        self, path: Path, members: Mapping[str, tarfile.TarInfo], keys: "Mapping[str, object]"
    ) -> dict[str, Label]:
        """The labels of those of `keys` that have one, from their members in the tar at `path`."""
        labels: dict[str, Label] = {}
        if self.field is not None:
            reason = f"has no .json member with the field {self.field!r}"
            self.problems += [(key, f"{reason} for image {key!r}") for key in keys if key not in members]
        if not any(key in members for key in keys):
            return labels
        with open(path, "rb") as file:
            for key, member in ((key, members[key]) for key in keys if key in members):
                file.seek(member.offset_data)
                content = file.read(min(member.size, _LONGEST_JSON if self.field else LONGEST_LABEL + 1))
                try:
                    label = parse_label(content) if self.field is None else label_of_json(content, self.field)
                    labels[key] = label if self.class_names is None else name_of(label, self.class_names, self._list)
                except ValueError as error:
                    shown = "" if self.field else f" {content[:20]!r}"
                    self.problems.append((key, f"has an unreadable label{shown} in {member.name!r} ({error})"))
        return labels
