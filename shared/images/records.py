"""Where the bytes of one image lie, and how they are read."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from zlib_ng.zlib_ng import crc32  # zlib's, a tenth of the time

from ..errors import DataError


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """Where one image's bytes lie. `offset` and `length` are in bytes; `label` is None where there is none.

    `extension` is that of its file name, in lower case.
    """

    key: str
    path: Path
    offset: int
    length: int
    label: int | None
    extension: str = "jpg"


def keys_sha256(keys: Iterable[str]) -> str:
    """Digest of a set of images by their keys, whatever their order."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


@lru_cache(maxsize=32)
def _descriptor(path: Path, inode: int, process: int) -> "_OpenFile":
    return _OpenFile(path)


class _OpenFile:
    """A descriptor that closes itself when the cache drops it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def read_bytes(record: ImageRecord) -> bytes:
    """The image's encoded bytes. Raises DataError if the file is gone or shorter than when it was listed."""
    try:
        # In the cache's key: the inode, as a tar may be replaced under its name; the process, as forked workers
        # must not share a descriptor's lifetime.
        descriptor = _descriptor(record.path, os.stat(record.path).st_ino, os.getpid())
        data = os.pread(descriptor.number, record.length, record.offset)
    except OSError as error:
        raise DataError(f"{record.path} cannot be read ({error.strerror}) for key {record.key!r}.") from None
    if len(data) != record.length:
        raise DataError(f"{record.path} ends inside the image of key {record.key!r}; it changed or was cut.")
    return data


def read_encoded(record: ImageRecord, expected: int, source: str | None = None) -> bytes:
    """The image's encoded bytes, if their CRC32 is the `expected` one of those that tokens were made of.

    Raises DataError, about `source` if the record lies in a copy of it, if it is not, or as `read_bytes` does.
    """
    data = read_bytes(record)
    if crc32(data) != expected:
        raise DataError(
            f"{source or record.path}: image {record.key!r} is not the one that was encoded (its CRC32 differs); "
            "give the images that the tokens were made of, or encode these."
        )
    return data
