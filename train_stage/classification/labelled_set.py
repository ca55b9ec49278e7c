"""The labelled training images of a run, in compact columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...shared.sources.records import ImageRecord, keys_sha256
from ..data.image_set import RemoteTar, ranked, shard_ends
from .classes import labels_of, labels_sha256, output_indices, output_names


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """n labelled images: the `ImageSet` of fine-tuning. Images are numbered by the rank of their key."""

    names: tuple[str, ...]
    """Class names, in the order of the head's outputs."""
    classes: NDArray[np.int64]
    """(n,) int64, by image: the index of its class."""
    images: NDArray[np.int64]
    """(n,) int64: the number of the image in each row, in the order of the source."""
    rows: NDArray[np.int64]
    """(n,) int64: the row of each image."""
    shard_ends: NDArray[np.int64]
    """(shards,) int64: the row after the last one of each tar, or of each thousand images of a folder."""
    keys_sha256: str
    """Digest of the set of keys, independent of their order (`records.keys_sha256`)."""
    labels_sha256: str
    """Digest of the label of each key."""
    keys: bytes
    """All keys by row, concatenated UTF-8."""
    key_ends: NDArray[np.int64]
    """(n,) int64: where each key ends in `keys`."""
    paths: tuple[str, ...]
    """The files that hold images."""
    files: NDArray[np.int64]
    """(n,) int64, by row: number of the file."""
    offsets: NDArray[np.int64]
    """(n,) int64, by row: byte offset of the image in its file."""
    lengths: NDArray[np.int64]
    """(n,) int64, by row: bytes of the image."""
    max_pixels: int | None = None
    """Most pixels of an image; Pillow's limit if None."""
    folder: None = None
    """No images are remote."""

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """The key of an image."""
        row = int(self.rows[index])
        return self.keys[self.key_ends[row - 1] if row else 0 : self.key_ends[row]].decode()

    def remote_tar(self, row: int) -> RemoteTar | None:
        """None: no images are remote."""
        return None

    def record(self, index: int) -> ImageRecord:
        """Where the bytes of an image lie."""
        row = self.rows[index]
        path = Path(self.paths[self.files[row]])
        return ImageRecord(
            self.key(index), path, int(self.offsets[row]), int(self.lengths[row]), None, max_pixels=self.max_pixels
        )


def labelled_set(records: Sequence[ImageRecord], outputs: int | None = None) -> LabelledSet:
    """The labelled images `records`, at least one, in the order of their source.

    `outputs` asks for more outputs than there are classes. Raises DataError and UsageError as `output_names` does.
    """
    labels = labels_of(records)
    names = output_names(labels, outputs)
    keys = [record.key.encode() for record in records]
    rows, images = ranked(keys)
    paths = {path: number for number, path in enumerate(dict.fromkeys(str(record.path) for record in records))}
    text = [record.key for record in records]
    return LabelledSet(
        names=names,
        classes=output_indices(labels, names)[rows],
        images=images,
        rows=rows,
        shard_ends=shard_ends(records),
        keys_sha256=keys_sha256(text),
        labels_sha256=labels_sha256(names, text, labels),
        keys=b"".join(keys),
        key_ends=np.array(list(accumulate(map(len, keys))), dtype=np.int64),
        paths=tuple(paths),
        files=np.array([paths[str(record.path)] for record in records], dtype=np.int64),
        offsets=np.array([record.offset for record in records], dtype=np.int64),
        lengths=np.array([record.length for record in records], dtype=np.int64),
        max_pixels=records[0].max_pixels,
    )
