"""Images joined with their rows of a token store, as columns of which every process sees the same memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...shared.images.fast_pixels import is_plain_jpeg
from ...shared.images.records import ImageRecord, read_encoded
from ...shared.storage.remote import is_url
from ...shared.tokens.rows import NO_LABEL
from .shared_columns import text_at

PLAIN, NOT_PLAIN = 1, 2


class RemoteTar(NamedTuple):
    """A tar behind a URL: where it lies on this disk while it is needed, and its bytes when it was encoded."""

    path: Path
    url: str
    size: int


@dataclass(frozen=True, eq=False)
class TokenisedImages:
    """n images joined with their rows of a token store. Images are numbered by key, so that a number means the same
    image however the images are spread over tars; rows stand as in the store, shard by shard."""

    tokens: np.ndarray
    """(n, V, H, W) uint16, by row; so are the next eight."""
    crops: np.ndarray
    """(n, V, 4) float64."""
    flips: np.ndarray
    """(n, V) bool."""
    labels: np.ndarray
    """(n,) int64, -1 where an image has none."""
    crc32: np.ndarray
    """(n,) uint32."""
    offsets: np.ndarray
    """(n,) int64: where the image's bytes begin in its file."""
    lengths: np.ndarray
    """(n,) int64: bytes."""
    files: np.ndarray
    """(n,) int64: the file's number."""
    keys: np.ndarray
    """(bytes,) uint8: all keys; `keys_ends` (n,) int64 says where each one ends."""
    keys_ends: np.ndarray
    paths: np.ndarray
    """(bytes,) uint8: the paths of all files, or their URLs; `paths_ends` says where each one ends."""
    paths_ends: np.ndarray
    sizes: np.ndarray
    """(files,) int64: bytes of each file that is a known tar, 0 for others."""
    rows: np.ndarray
    """(n,) int64: the row of each image."""
    images: np.ndarray
    """(n,) int64: the image of each row."""
    shard_ends: np.ndarray
    """(shards,) int64: the row after the last one of each shard."""
    keys_sha256: str
    """Which images these are, whatever their order (`images.keys_sha256`)."""
    plain: np.ndarray
    """(n,) uint8, by image, written by the processes that load: `PLAIN` or `NOT_PLAIN` once that is known."""
    folder: Path | None = None
    """Where remote tars lie while they are needed; None if all images are local."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def views(self) -> int:
        """How many views of an image are stored."""
        return self.tokens.shape[1]

    def key(self, index: int) -> str:
        return text_at(self.keys, self.keys_ends, self.rows[index])

    def label(self, index: int) -> int | None:
        label = int(self.labels[self.rows[index]])
        return None if label == NO_LABEL else label

    @property
    def is_remote(self) -> bool:
        """Whether tars must be fetched (`streaming.tars_at_hand`)."""
        return self.folder is not None

    def source(self, index: int) -> str:
        """The path or URL of the file that holds an image."""
        return text_at(self.paths, self.paths_ends, self.files[self.rows[index]])

    def remote_tar(self, row: int) -> RemoteTar | None:
        """The remote tar that holds the image of a row; None for a local one."""
        file = self.files[row]
        url = text_at(self.paths, self.paths_ends, file)
        return RemoteTar(self._here(url), url, int(self.sizes[file])) if is_url(url) else None

    def _here(self, source: str) -> Path:
        return self.folder / source.split("?")[0].rpartition("/")[2] if is_url(source) else Path(source)

    def record(self, index: int) -> ImageRecord:
        """Where the bytes of an image lie on this disk, as soon as they do."""
        row, path = self.rows[index], self._here(self.source(index))
        return ImageRecord(self.key(index), path, int(self.offsets[row]), int(self.lengths[row]), self.label(index))

    def is_plain(self, index: int, content: bytes, name: str) -> bool:
        """`pixels.is_plain_jpeg` of an image; its header is looked at once, since `read` sees to it that the bytes are
        the same every time."""
        if not self.plain[index]:
            self.plain[index] = PLAIN if is_plain_jpeg(content, name) else NOT_PLAIN
        return self.plain[index] == PLAIN

    def read(self, record: ImageRecord, index: int) -> bytes:
        """The bytes of the image `index`, at `record`; DataError unless they are those that were encoded."""
        return read_encoded(record, self.crc32[self.rows[index]], self.source(index) if self.is_remote else None)
