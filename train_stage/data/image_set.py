"""The images of a run, as the order of batches, the logs and the fetching of remote tars know them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...shared.sources.folders import FOLDER_SHARD_IMAGES
from ...shared.sources.keys import EXTENSIONS, extension_of
from ...shared.sources.records import ImageRecord


class RemoteTar(NamedTuple):
    """A tar behind a URL: its path on this disk while it is needed, and its size in bytes when it was encoded."""

    path: Path
    url: str
    size: int


class ImageSet(Protocol):
    """n images, numbered by the rank of their key, so that a number names the same image in whatever tars they lie.

    Rows are the images in the order of their shards.
    """

    @property
    def shard_ends(self) -> NDArray[np.int64]:
        """(shards,) int64: the row after the last one of each shard."""
        ...

    @property
    def images(self) -> NDArray[np.int64]:
        """(n,) int64: the number of the image in each row."""
        ...

    @property
    def keys_sha256(self) -> str:
        """Digest of the set of keys, independent of their order (`records.keys_sha256`)."""
        ...

    @property
    def folder(self) -> Path | None:
        """Folder of remote tars while they are needed; None if all images are local."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The key of an image."""
        ...

    def remote_tar(self, row: int) -> RemoteTar | None:
        """The remote tar that holds the image of a row; None for a local file."""
        ...


def ranked(keys: Sequence[bytes]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) int64 each, of keys by row: the row of each image, and the number of the image in each row."""
    rows = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    images = np.empty_like(rows)
    images[rows] = np.arange(len(rows))
    return rows, images


def shard_ends(records: Sequence[ImageRecord]) -> NDArray[np.int64]:
    """(shards,) int64: the row after the last one of each tar, or of each thousand images of a folder."""
    count = len(records)
    if extension_of(records[0].path.name) in EXTENSIONS:
        ends = [*range(FOLDER_SHARD_IMAGES, count, FOLDER_SHARD_IMAGES), count]
    else:
        ends = [row for row in range(1, count) if records[row].path != records[row - 1].path] + [count]
    return np.array(ends, dtype=np.int64)
