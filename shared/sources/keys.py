"""Keys of images: from file names, and an index of many of them."""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of the images that are read."""
OTHER_PICTURES = ("avif", "bmp", "gif", "heic", "jp2", "jpe", "jxl", "tif", "tiff")
"""Extensions of pictures that are not read, but reported where there is no readable one of the same key."""
Skipped = list[tuple[str, str]]
"""(key, reason) of what was left out; the key is "" for a part of a tar that has none."""


def key_of(name: str) -> str:
    """WebDataset's `__key__`: the path, with the base name up to its first dot."""
    directory, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{directory}/{stem}" if directory else stem


def extension_of(name: str) -> str:
    """What follows the last dot of a file's name, in lower case."""
    return name.rpartition(".")[2].lower()


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
