"""Checks the content of a JSON file against a typed schema (msgspec), and names the field that is wrong."""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta
from upath import UPath

from ..errors import DataError
from ..printable import printable
from ..storage.bounded import read_bounded

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Text = Annotated[str, Meta(max_length=65_536)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Size = Annotated[int, Meta(ge=1, le=1 << 20)]
"""A size of a model, an image or a grid."""
Pixels = Annotated[int, Meta(ge=1, lt=2**31)]
Side = Annotated[int, Meta(ge=1, le=4096)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0, le=1e300)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Triple = tuple[Finite, Finite, Finite]
PositiveTriple = tuple[Positive, Positive, Positive]

MOST_PLAIN_JSON = 16 << 20
"""The largest JSON file without a seal that is read."""
_LONGEST_REASON = 200
_T = TypeVar("_T")


def checked(
    content: Any, schema: type[_T], path: Path | UPath | str, remedy: str = "restore it or make it again"
) -> _T:
    """The content of a JSON file as an object of `schema`.

    Args:
        content: plain JSON values; they are not changed.
        schema: a msgspec.Struct, or any type that msgspec converts to.
        path: the file, for the message.
        remedy: what to do about it, for the message.

    Raises:
        DataError naming the file and the field, unless the content fits the schema.
    """
    try:
        return msgspec.convert(content, schema)
    except (msgspec.ValidationError, RecursionError) as error:
        raise DataError(f"{path}: {explained_field(error)}; {remedy}.") from None


def read_json(path: Path, schema: type[_T], what: str) -> _T:
    """Reads a JSON file without a seal.

    Args:
        path: the file.
        schema: as for `checked`.
        what: what the file should be, for the message, such as "a description of a ViT that mapet exported".

    Raises:
        DataError if it is missing, too large, no JSON, or does not fit the schema.
    """
    try:
        return msgspec.json.decode(read_bounded(path, MOST_PLAIN_JSON), type=schema)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; it should be {what}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    except msgspec.ValidationError as error:
        raise DataError(f"{path} is not {what}: {explained_field(error)}; make it again.") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise DataError(f"{path} is not {what} ({_shortened(str(error))}); make it again.") from None


def explained_field(error: Exception) -> str:
    """An error of msgspec in words, such as "the field shards[3].images is wrong (expected int, got str)"."""
    reason, _, place = str(error).rpartition(" - at `")
    if not reason:
        reason, place = str(error), "$`"
    field = place.rstrip("`").removeprefix("$").removeprefix(".")
    missing = re.fullmatch(r"Object missing required field `(.+)`", reason)
    if missing:
        return f"the field {_shortened('.'.join(filter(None, (field, missing[1]))))} is missing"
    reason = _shortened(reason.replace("`", "")[:1].lower() + reason.replace("`", "")[1:])
    return f"the field {_shortened(field)} is wrong ({reason})" if field else f"its content is wrong ({reason})"


def _shortened(text: str) -> str:
    return printable(text[:_LONGEST_REASON]) + ("..." if len(text) > _LONGEST_REASON else "")
