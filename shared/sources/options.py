"""How a source is read: where keys end and begin, which picture of a key is its image, how large an image may be."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import UsageError
from .keys import EXTENSIONS, FIRST_DOT, FIRST_EXTENSIONS, LAST_DOT

KEY_UNTIL = (FIRST_DOT, LAST_DOT)
KEY_PREFIX = ("none", "tar")
LABEL_FROM = ("auto", "tar")


@dataclass(frozen=True)
class SourceOptions:
    """The options of every command that opens IMAGES; None is the default of each.

    Raises UsageError for an unknown value.
    """

    key_until: str | None = None
    """Where a key ends in a file's name, "first-dot" or "last-dot"; by default at the first dot in tars, as in
    WebDataset, and at the last one in folders."""
    key_prefix: str | None = None
    """"tar": a key begins with the name of its tar, or of its folder where several are given; "none" by default."""
    image_field: str | None = None
    """What follows the key in the name of the member that is the image, such as "jpg", or several with commas; by
    default any picture, if a key has only one."""
    max_pixels: int | None = None
    """Most pixels of an image; by default 178,956,970, Pillow's limit."""
    label_from: str | None = None
    """"tar": the class of a tar's images is the tar's name; "auto" by default: if all tars are named like n01440764."""
    is_old: bool = False
    """A folder is read as it was before keys in folders ended at the last dot."""

    def __post_init__(self) -> None:
        for name, choices in (("key_until", KEY_UNTIL), ("key_prefix", KEY_PREFIX), ("label_from", LABEL_FROM)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UsageError(f"--{name.replace('_', '-')} {value} is unknown; choose {' or '.join(choices)}.")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise UsageError(f"--max-pixels {self.max_pixels} must be a positive number of pixels.")
        if self.image_field is not None and not self.image_fields:
            raise UsageError(f"--image-field {self.image_field!r} names no field; give one such as jpg.")

    @property
    def image_fields(self) -> tuple[str, ...]:
        """The fields of `image_field`, in lower case and without a leading dot."""
        parts = (self.image_field or "").replace(";", ",").split(",")
        return tuple(part.strip().lower().lstrip(".") for part in parts if part.strip())

    @property
    def extensions(self) -> tuple[str, ...]:
        """Extensions of the files that are images."""
        return FIRST_EXTENSIONS if self.is_old else EXTENSIONS

    @property
    def prefixes(self) -> bool:
        """Whether keys begin with the name of their tar or folder."""
        return self.key_prefix == "tar"

    def until(self, kind: str) -> str:
        """Where keys end in sources of this kind, "tar" or "folder"."""
        return self.key_until or (LAST_DOT if kind == "folder" else FIRST_DOT)

    def to_json(self, kind: str) -> dict[str, Any]:
        """What a store records of a source of this kind: nothing of a tar that is read as every version reads it."""
        if self.is_old and kind == "folder":
            return {}
        recorded: dict[str, Any] = {
            "key_prefix": "tar" if self.prefixes else None,
            "image_field": self.image_field,
            "max_pixels": self.max_pixels,
            "label_from": "tar" if self.label_from == "tar" else None,
        }
        until = self.until(kind)
        recorded["key_until"] = until if kind == "folder" or until != FIRST_DOT else None
        return {name: value for name, value in sorted(recorded.items()) if value is not None}

    @classmethod
    def of_store(cls, sources: Iterable[Mapping[str, Any]]) -> "SourceOptions":
        """The options with which a store was encoded, from the `source` of each of its entries."""
        untils: set[str] = set()
        recorded: dict[str, Any] = {}
        is_old = False
        for source in sources:
            options: Mapping[str, Any] = source.get("options") or {}
            untils.add(options.get("key_until", FIRST_DOT))
            recorded |= {name: value for name, value in options.items() if name != "key_until"}
            is_old |= source.get("kind") == "folder" and not options
        known = {field.name for field in fields(cls)} - {"is_old"}
        until = next(iter(untils)) if len(untils) == 1 else None
        return cls(key_until=until, is_old=is_old, **{name: value for name, value in recorded.items() if name in known})

    def given(self, other: "SourceOptions", store: str) -> "SourceOptions":
        """The options of a store with those that were given anew.

        Raises UsageError if `other` has another value for one that changes keys; `store` is named in the message.
        """
        for name, default in (("key_until", None), ("key_prefix", "none"), ("image_field", None)):
            before, now = getattr(self, name) or default, getattr(other, name)
            if now is not None and now != before:
                option = f"--{name.replace('_', '-')}"
                how = f"with {option} {before}" if before else f"without {option}"
                raise UsageError(
                    f"{store} was begun {how} and now {option} {now} is given; leave it out or choose another --out."
                )
        changes = {name: getattr(other, name) for name in ("max_pixels", "label_from") if getattr(other, name)}
        return replace(self, **changes)


DEFAULT = SourceOptions()
