"""Images joined with their rows of a token store, in columns that all processes of a node share."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import Tokens
from ...shared.images.fast_pixels import is_plain_jpeg
from ...shared.labels.columns import NO_LABEL
from ...shared.labels.parsing import Label
from ...shared.sources.records import ImageRecord, read_encoded
from ...shared.storage.remote import is_url
from .image_set import RemoteTar
from .shared_columns import text_at

PLAIN, NOT_PLAIN = 1, 2


@dataclass(frozen=True, eq=False)
class TokenisedImages:
    """n images joined with their rows of a token store: the `ImageSet` of pre-training.

    Images are numbered by the rank of their key; rows are in the store's order, shard by shard.
    """

    tokens: Tokens
    """(n, V, H, W) uint16 or uint32, by row, as are the next seven columns."""
    crops: NDArray[np.float64]
    """(n, V, 4) float64: top, left, height, width in upright source pixels."""
    flips: NDArray[np.bool_]
    """(n, V) bool: mirrored left to right after the crop."""
    labels: NDArray[np.int64]
    """(n,) int64: number of the label in `classes`, -1 where an image has none."""
    crc32: NDArray[np.uint32]
    """(n,) uint32: of the image's bytes."""
    offsets: NDArray[np.int64]
    """(n,) int64: byte offset of the image in its file."""
    lengths: NDArray[np.int64]
    """(n,) int64: bytes of the image."""
    files: NDArray[np.int64]
    """(n,) int64: number of the file that holds the image."""
    keys: NDArray[np.uint8]
    """(bytes,) uint8: all keys, concatenated UTF-8."""
    keys_ends: NDArray[np.int64]
    """(n,) int64: where each key ends in `keys`."""
    paths: NDArray[np.uint8]
    """(bytes,) uint8: the paths or URLs of all files, concatenated UTF-8."""
    paths_ends: NDArray[np.int64]
    """(files,) int64: where each path ends in `paths`."""
    classes: NDArray[np.uint8]
    """(bytes,) uint8: the different labels, class numbers or names, as concatenated JSON values in UTF-8."""
    classes_ends: NDArray[np.int64]
    """(classes,) int64: where each label ends in `classes`."""
    sizes: NDArray[np.int64]
    """(files,) int64: bytes of each file that is a known tar, 0 for others."""
    rows: NDArray[np.int64]
    """(n,) int64: the row of each image."""
    images: NDArray[np.int64]
    """(n,) int64: the image of each row."""
    shard_ends: NDArray[np.int64]
    """(shards,) int64: the row after the last one of each shard."""
    keys_sha256: str
    """Digest of the set of keys, independent of their order (`records.keys_sha256`)."""
    plain: NDArray[np.uint8]
    """(n,) uint8, by image: `PLAIN` or `NOT_PLAIN`; the loader's processes fill it in."""
    max_pixels: int | None = None
    """The most pixels of an image; None is Pillow's limit."""
    folder: Path | None = None
    """Folder of remote tars while they are needed; None if all images are local."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def views(self) -> int:
        """Stored views per image."""
        return int(self.tokens.shape[1])

    def key(self, index: int) -> str:
        """The key of an image."""
        return text_at(self.keys, self.keys_ends, self.rows[index])

    def label(self, index: int) -> Label | None:
        """The number or the name of an image's class; None if it has none."""
        number = int(self.labels[self.rows[index]])
        if number == NO_LABEL:
            return None
        label: Label = json.loads(text_at(self.classes, self.classes_ends, number))
        return label

    @property
    def is_remote(self) -> bool:
        """Whether tars must be fetched (`remote_tars.fetched_tars`)."""
        return self.folder is not None

    def source(self, index: int) -> str:
        """The path or URL of the file that holds an image."""
        return text_at(self.paths, self.paths_ends, self.files[self.rows[index]])

    def remote_tar(self, row: int) -> RemoteTar | None:
        """The remote tar that holds the image of a row; None for a local one."""
        file = self.files[row]
        url = text_at(self.paths, self.paths_ends, file)
        return RemoteTar(self._local_path(url), url, int(self.sizes[file])) if is_url(url) else None

    def _local_path(self, source: str) -> Path:
        if self.folder is None or not is_url(source):
            return Path(source)
        return self.folder / source.split("?")[0].rpartition("/")[2]

    def record(self, index: int) -> ImageRecord:
        """Where the bytes of an image lie on this disk; for a remote tar, where they will lie once it is fetched."""
        row, path = self.rows[index], self._local_path(self.source(index))
        return ImageRecord(self.key(index), path, int(self.offsets[row]), int(self.lengths[row]), self.label(index))

    def is_plain(self, index: int, content: bytes, name: str) -> bool:
        """`fast_pixels.is_plain_jpeg`, computed once per image, as `read` checks that its bytes never change."""
        if not self.plain[index]:
            self.plain[index] = PLAIN if is_plain_jpeg(content, name, self.max_pixels) else NOT_PLAIN
        return bool(self.plain[index] == PLAIN)

    def read(self, record: ImageRecord, index: int) -> bytes:
        """The bytes of image `index`, at `record`. Raises DataError if they are not those that were encoded."""
        return read_encoded(record, int(self.crc32[self.rows[index]]), self.source(index) if self.is_remote else None)
