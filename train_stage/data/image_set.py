"""The images of a run, as the order of batches, the logs and the fetching of remote tars know them."""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


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
