"""Keys of images: from file names, and an index of many of them."""

import hashlib
import re
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

FIRST_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of the images that every version reads. Of several pictures under one key, the only one of these is the
image."""
EXTENSIONS = (
    *FIRST_EXTENSIONS,
    *("jpe", "jfif", "pjpeg", "image", "img", "bmp", "gif", "tif", "tiff", "avif", "jp2"),
)
"""Extensions of the images that are read."""
OTHER_PICTURES = ("avif", "bmp", "gif", "heic", "heif", "jp2", "jpe", "jxl", "tif", "tiff")
"""Extensions of pictures that are reported where they are not read and there is no readable one of the same key."""
Skipped = list[tuple[str, str]]
"""(key, reason) of what was left out; the key is "" for a part of a tar that has none."""

FIRST_DOT, LAST_DOT = "first-dot", "last-dot"

_SYSTEM_NAMES = (
    *("__MACOSX", "@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "lost+found", "Thumbs.db"),
    *("ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
)
"""Names that operating systems and network disks add to folders, in any case."""
_HIDDEN = re.compile(
    r"(?:^|/)(?:\.(?!\.?(?:/|$))[^/]*"
    r"|PaxHeaders?(?:\.\w+)?"  # in which a tar program that does not know PAX unpacks extended headers
    rf"|{'|'.join(map(re.escape, _SYSTEM_NAMES))})(?:/|$)",
    re.IGNORECASE,
)


def key_of(name: str, until: str = FIRST_DOT) -> str:
    """The path, with the base name up to its first dot (WebDataset's `__key__`) or to its last dot."""
    directory, _, base = name.rpartition("/")
    stem = base.partition(".")[0] if until == FIRST_DOT or "." not in base else base.rpartition(".")[0]
    return f"{directory}/{stem}" if directory else stem


def extension_of(name: str) -> str:
    """What follows the last dot of a file's base name, in lower case; "" if it has no dot."""
    _, dot, extension = name.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


def is_hidden(name: str) -> bool:
    """Whether a relative path, or a folder in it, is hidden or was made by a system: never an image, class or tar."""
    return _HIDDEN.search(name) is not None


def plain(text: str) -> str:
    """`text` with anything that is not UTF-8 escaped, so that it can be written and hashed."""
    return text.encode("utf-8", "backslashreplace").decode()


def unfit_name(name: str) -> str | None:
    """Why a name cannot be a key, or None."""
    if name.startswith("/") or ".." in name.split("/"):
        return f"holds {name!r}, a name that leaves its folder; rename it"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return f"holds {name!r}, and that name is not UTF-8; rename it"
    return None


def key_digests(keys: Iterable[str]) -> NDArray[np.uint64]:
    """The 8-byte BLAKE2b digest of each key, uint64 (n,)."""
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


class KeyIndex:
    """Where each of many keys is: the number of its shard and of its row, in 16 bytes per key."""

    def __init__(self, shards: Iterable[Iterable[str]]):
        """`shards` are the keys of each shard, in the order of its rows."""
        digests = [key_digests(keys) for keys in shards]
        sizes = [len(part) for part in digests]
        joined = np.concatenate([np.empty(0, dtype=np.uint64), *digests])
        order = np.argsort(joined, kind="stable")
        self._digests = joined[order]
        self._shards = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)[order]
        self._rows = np.concatenate([np.empty(0, dtype=np.uint32), *map(_row_numbers, sizes)])[order]

    @property
    def nbytes(self) -> int:
        """Bytes that the index takes."""
        return self._digests.nbytes + self._shards.nbytes + self._rows.nbytes

    def candidates(self, key: str) -> list[tuple[int, int]]:
        """(shard, row) of each key with the digest of `key`: of the key itself, and hardly ever of another one."""
        digest = key_digests([key])[0]
        first, last = (int(np.searchsorted(self._digests, digest, side)) for side in ("left", "right"))
        return [(int(self._shards[at]), int(self._rows[at])) for at in range(first, last)]


def _row_numbers(size: int) -> NDArray[np.uint32]:
    return np.arange(size, dtype=np.uint32)


class KeyLedger:
    """Detects a key that is in two shards, in 8 bytes per key."""

    def __init__(self) -> None:
        self._digests: dict[str, NDArray[np.uint64]] = {}

    def add(self, shard: str, keys: Iterable[str]) -> None:
        """Adds the keys of one shard."""
        self._digests[shard] = key_digests(keys)

    def merge(self, other: "KeyLedger") -> None:
        """Adds the shards of another ledger."""
        self._digests |= other._digests

    def __contains__(self, shard: str) -> bool:
        return shard in self._digests

    def count(self, shard: str) -> int:
        """How many keys a shard has; 0 for a shard that was not added."""
        return len(self._digests.get(shard, ()))

    def sharing(self) -> list[tuple[str, str]]:
        """Pairs of shards, sorted by name, that have a key in common, or (hardly ever) keys of equal digests."""
        names = sorted(self._digests)
        if not names:
            return []
        digests = np.concatenate([self._digests[name] for name in names])
        owners = np.repeat(np.arange(len(names)), [len(self._digests[name]) for name in names])
        order = np.argsort(digests, kind="stable")
        (equal,) = np.nonzero(digests[order[1:]] == digests[order[:-1]])
        pairs = np.unique(np.stack([owners[order[equal]], owners[order[equal + 1]]], axis=1), axis=0)
        return [(names[first], names[second]) for first, second in pairs.tolist() if first != second]

    def refuse_doubles(self, keys_of: Callable[[str], Iterable[str]]) -> None:
        """Raises DataError if two shards share a key; `keys_of(shard)` is called to name it."""
        for first, second in self.sharing():
            common = set(keys_of(first)) & set(keys_of(second))
            if common:
                raise DataError(
                    f"key {min(common)!r} is in both {first} and {second}; keys must be unique: rename the images, or "
                    "give --key-prefix tar, so that a key begins with the name of its tar or folder."
                )
