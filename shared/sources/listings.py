"""Listings of tars that were read before: headers and labels of a million images take minutes, a listing milliseconds.

`mapet/listings` in XDG_CACHE_HOME, or in ~/.cache, holds a compressed file for each tar. It counts as long as the
tar's inode, size and times of change are the same, and everything else that a listing depends on; its digest is
checked. Only whole, faultless tars of many images are kept. The folder may be deleted at any time.
"""

import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from ..labels.parsing import Label
from ..storage.compressed import cache_folder
from .passed import PassedOver
from .records import ImageRecord

FEWEST_IMAGES = 256
"""A tar of fewer images is listed each time."""
_VERSION = 1
_DIGEST = 32
_SETTLED_NS = 2_000_000_000
"""A tar changed so recently might be changed again without another time of change."""
_LEVEL = 1


class _Stored(Struct, array_like=True):
    """The images of a tar in its order, one list a field, and what was passed over."""

    stamp: tuple[int, int, int, int]
    keys: list[str]
    offsets: list[int]
    lengths: list[int]
    labels: list[Label | None]
    extensions: list[str]
    passed: dict[str, tuple[int, str]]


def listed(
    path: Path,
    depends_on: Mapping[str, Any],
    max_pixels: int | None,
    passed: PassedOver,
    read: Callable[[PassedOver], tuple[list[ImageRecord], bool]],
) -> list[ImageRecord]:
    """The images of the tar at `path`: those of its last listing, or what `read` returns.

    Args:
        path: the tar.
        depends_on: JSON values of all else that changes the listing, such as the options of the source.
        max_pixels: the most pixels of an image, for the records.
        passed: counts the members that are passed over.
        read: lists the tar; its second value is whether the listing may be kept.
    """
    stamp = _stamp(path)
    file = _file_of(path, depends_on)
    stored = None if stamp is None else _read(file, stamp)
    if stored is not None:
        passed.merge(PassedOver.of(stored.passed))
        columns = zip(stored.keys, stored.offsets, stored.lengths, stored.labels, stored.extensions, strict=True)
        return [ImageRecord(k, path, at, size, label, kind, max_pixels) for k, at, size, label, kind in columns]
    over = PassedOver()
    records, is_whole = read(over)
    passed.merge(over)
    settled = stamp is not None and time.time_ns() - max(stamp[2:]) > _SETTLED_NS and _stamp(path) == stamp
    if stamp is not None and settled and is_whole and len(records) >= FEWEST_IMAGES:
        _write(file, stamp, records, over)
    return records


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    """Inode, size and times of the last change of the content and of the inode; None for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _file_of(path: Path, depends_on: Mapping[str, Any]) -> Path:
    identity = json.dumps([_VERSION, os.path.abspath(path), depends_on], sort_keys=True)
    return cache_folder().with_name("listings") / hashlib.sha256(identity.encode()).hexdigest()[:32]


def _read(file: Path, stamp: tuple[int, int, int, int]) -> _Stored | None:
    """The listing in a file; None if there is none, if it is damaged, or if the tar has changed since."""
    try:
        content = file.read_bytes()
        packed = content[_DIGEST:]
        if hashlib.sha256(packed).digest() != content[:_DIGEST]:
            return None
        stored = msgspec.msgpack.decode(zlib.decompress(packed), type=_Stored)
    except (OSError, zlib.error, msgspec.DecodeError):
        return None
    return stored if stored.stamp == stamp else None


def _write(file: Path, stamp: tuple[int, int, int, int], records: list[ImageRecord], passed: PassedOver) -> None:
    stored = _Stored(
        stamp,
        [record.key for record in records],
        [record.offset for record in records],
        [record.length for record in records],
        [record.label for record in records],
        [record.extension for record in records],
        passed.kinds,
    )
    packed = zlib.compress(msgspec.msgpack.encode(stored), _LEVEL)
    with suppress(OSError):  # a disk that is full or read-only costs the time of another listing
        file.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=file.parent, prefix=".")
        try:
            with open(number, "wb") as partial:
                partial.write(hashlib.sha256(packed).digest() + packed)
            os.replace(name, file)
        except OSError:
            os.unlink(name)
