"""The training images of a segmentation run, with their masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...shared.sources.records import keys_sha256
from ..data.image_set import RemoteTar, ranked, shard_ends
from .data import SegmentationData
from .masked_images import MaskedImage
from .masks import MaskRule


@dataclass(frozen=True, eq=False)
class MaskedSet:
    """n images with masks: the `ImageSet` of segmentation. Images are numbered by the rank of their key."""

    names: tuple[str, ...]
    """Class names, in the order of the head's outputs."""
    rule: MaskRule
    pairs: Sequence[MaskedImage]
    """By row, in the order of the source."""
    rows: NDArray[np.int64]
    """(n,) int64: the row of each image."""
    images: NDArray[np.int64]
    """(n,) int64: the number of the image in each row."""
    shard_ends: NDArray[np.int64]
    """(shards,) int64: the row after the last one of each tar, or of each thousand images of a folder."""
    keys_sha256: str
    """Digest of the set of keys, independent of their order (`records.keys_sha256`)."""
    masks_sha256: str
    """Digest of the class indices of each key's mask."""
    folder: None = None
    """No images are remote."""

    @classmethod
    def of(cls, data: SegmentationData) -> "MaskedSet":
        """The training images of `data`."""
        records = [pair.image for pair in data.train]
        keys = [record.key for record in records]
        rows, images = ranked([key.encode() for key in keys])
        digests = keys_sha256(keys), data.masks.sha256
        return cls(data.names, data.rule, data.train, rows, images, shard_ends(records), *digests)

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, index: int) -> MaskedImage:
        """An image and its mask."""
        return self.pairs[int(self.rows[index])]

    def key(self, index: int) -> str:
        """The key of an image."""
        return self.pair(index).image.key

    def remote_tar(self, row: int) -> RemoteTar | None:
        """None: no images are remote."""
        return None
