"""Files of artifacts from elsewhere: regular files of a bounded size, inside the folder of their artifact."""

import os
import stat
from pathlib import Path, PurePosixPath

from upath import UPath

from ..errors import DataError
from .remote import file_size, is_remote, read_whole

MOST_JSON_BYTES = 256 << 20
"""The largest JSON file that is read: the manifest of a store of some 250,000 shards."""


def file_inside(folder: Path | UPath, name: str) -> Path | UPath:
    """The path of the file `name`, a relative path with slashes, of the artifact in `folder`; it need not exist.

    Nothing is opened. Links are followed, but not out of the folder; a snapshot of the Hugging Face cache may lead to
    the blobs of its repository.

    Raises:
        DataError if the name or a link leads out of the folder, or to anything but a regular file.
    """
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name:
        raise DataError(
            f"{folder} names the file {name!r}, which is not inside it; do not use this artifact, or make it again."
        )
    path: Path | UPath = folder / name
    refuse_irregular(path, folder)
    return path


def refuse_irregular(path: Path | UPath, folder: Path | UPath | None = None) -> None:
    """Raises DataError if `path` exists and is not a regular file, or is outside of `folder` (default: its parent)."""
    if is_remote(path):
        return
    inside = path.parent if folder is None else Path(str(folder))
    if not os.path.lexists(path):
        return
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(place) for place in _allowed(inside)):
        raise DataError(
            f"{path} is a link to {real}, outside of {inside}; put the file itself there, or give the folder in which "
            "all files of the artifact are."
        )
    if os.path.exists(real) and not stat.S_ISREG(os.stat(real).st_mode):
        raise DataError(f"{path} is not a regular file (a folder, a device or a pipe); put the file itself there.")


def _allowed(folder: Path) -> list[Path]:
    """The folders in which the files of an artifact may lie."""
    real = Path(os.path.realpath(folder))
    snapshots = (parent.parent for parent in real.parents if parent.name == "snapshots")
    return [real, *(repository / "blobs" for repository in snapshots)]


def read_bounded(path: Path | UPath, most: int, folder: Path | UPath | None = None) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file, local or at a URL.
        most: how many bytes it may have; a larger one is not read.
        folder: the folder of its artifact (default: its parent), which a link must not leave.

    Raises:
        DataError if it is larger, no regular file or outside of the folder; OSError if it is missing or unreadable.
    """
    refuse_irregular(path, folder)
    size = file_size(path)
    if size > most:
        raise DataError(f"{path} has {size:,} bytes, and no such file has more than {most:,}; restore it.")
    return read_whole(path)
