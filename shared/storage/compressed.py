"""Compressed tars: unpacked once into a cache, because images are read in any order."""

import bz2
import gzip
import hashlib
import lzma
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from filelock import FileLock

from ..errors import DataError, UsageError

_SUFFIXES = {
    ".tar.gz": "gzip",
    ".tgz": "gzip",
    ".tar.bz2": "bzip2",
    ".tbz2": "bzip2",
    ".tar.xz": "xz",
    ".txz": "xz",
    ".tar.zst": "zstandard",
    ".tzst": "zstandard",
}


def is_tar_name(name: str | Path) -> bool:
    """Whether a file's name or a URL's path is that of a tar, compressed or not."""
    return str(name).lower().endswith(".tar") or is_compressed(name)


def is_compressed(name: str | Path) -> bool:
    """Whether a file's name is that of a compressed tar."""
    return str(name).lower().endswith(tuple(_SUFFIXES))


def without_suffix(name: str) -> str:
    """The name of a tar without `.tar` or the suffix of a compressed tar."""
    suffix = next((suffix for suffix in (".tar", *_SUFFIXES) if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def cache_folder() -> Path:
    """The folder in which unpacked tars are kept: `mapet/unpacked` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mapet", "unpacked")


def unpacked_path(path: Path) -> Path:
    """Where `unpacked` puts the tar inside a compressed tar: a file whose name changes with the compressed one."""
    status = path.stat()
    identity = f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    folder = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_folder() / folder / f"{without_suffix(path.name)}.tar"


def unpacked(path: Path) -> Path:
    """The path of the tar inside a compressed tar, which is unpacked into the cache unless it is there already.

    Raises DataError if the file is damaged or does not fit on the disk, UsageError without a library for it.
    """
    tar = unpacked_path(path)
    if tar.exists():
        return tar
    try:
        tar.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(tar.with_name(".lock")):  # torchrun's processes open a source at the same time
            if not tar.exists():
                unpack(path, tar)
    except OSError as error:
        raise DataError(
            f"{path} cannot be unpacked to {tar.parent} ({error.strerror or error}); unpack it yourself, or set "
            "XDG_CACHE_HOME to a folder with room."
        ) from None
    return tar


def unpack(path: Path, tar: Path) -> None:
    """Writes the tar inside a compressed tar to `tar`, which appears when it is complete.

    Raises DataError if the file is damaged, UsageError if a library for it is not installed, OSError of the disk.
    """
    partial = tar.with_name(f".{tar.name}.{os.getpid()}.partial")
    try:
        with _opened(path) as packed, open(partial, "wb") as file:
            while block := _read(packed, path):
                file.write(block)
        os.replace(partial, tar)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def _read(packed: BinaryIO, path: Path) -> bytes:
    try:
        return packed.read(1 << 22)
    except Exception as error:  # each decompressor has errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{path} cannot be unpacked ({reason}); make or download it again.") from None


def _opened(path: Path) -> BinaryIO:
    kind = next(kind for suffix, kind in _SUFFIXES.items() if path.name.lower().endswith(suffix))
    if kind == "zstandard":
        try:
            import zstandard
        except ImportError:
            raise UsageError(
                f"{path} needs a library that is not installed: pip install zstandard, or unpack it with zstd -d."
            ) from None
        return cast(BinaryIO, zstandard.open(path, "rb"))
    if kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(path))
    return cast(BinaryIO, bz2.BZ2File(path) if kind == "bzip2" else lzma.LZMAFile(path))
