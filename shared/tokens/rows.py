"""The rows of a token shard: what is stored of each image, in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

NO_LABEL = -1
STRINGS = ("keys", "paths")
"""The columns of text; all others are plain numbers."""


@dataclass(frozen=True, eq=False)
class ShardRows:
    """The rows of one shard, in the source's order: n images, V views each, a grid of H x W tokens."""

    keys: np.ndarray
    """(n,) str: WebDataset keys."""
    tokens: np.ndarray
    """(n, V, H, W) uint16."""
    crops: np.ndarray
    """(n, V, 4) float64: top, left, height, width in upright source pixels."""
    flips: np.ndarray
    """(n, V) bool: mirrored left to right after the crop."""
    sizes: np.ndarray
    """(n, 2) int32: height, width of the upright image in pixels."""
    labels: np.ndarray
    """(n,) int64, -1 where an image has none."""
    paths: np.ndarray
    """(n,) str: path inside a folder source; empty for tars."""
    offsets: np.ndarray
    """(n,) int64: where the image's bytes begin in its file."""
    lengths: np.ndarray
    """(n,) int64: bytes."""
    crc32: np.ndarray
    """(n,) uint32: of the image's bytes."""

    def __len__(self) -> int:
        return len(self.keys)


def empty_rows(views: int, grid: tuple[int, int]) -> ShardRows:
    """No rows at all, of the right shapes."""
    return ShardRows(
        keys=np.empty(0, dtype=object),
        tokens=np.empty((0, views, *grid), dtype=np.uint16),
        crops=np.empty((0, views, 4), dtype=np.float64),
        flips=np.empty((0, views), dtype=bool),
        sizes=np.empty((0, 2), dtype=np.int32),
        labels=np.empty(0, dtype=np.int64),
        paths=np.empty(0, dtype=object),
        offsets=np.empty(0, dtype=np.int64),
        lengths=np.empty(0, dtype=np.int64),
        crc32=np.empty(0, dtype=np.uint32),
    )


def concatenate_rows(parts: Sequence[ShardRows]) -> ShardRows:
    """The rows of all parts, in their order."""
    return ShardRows(
        **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(ShardRows)}
    )


def take_rows(rows: ShardRows, places: Sequence[int]) -> ShardRows:
    """The rows at `places`, in their order."""
    return ShardRows(**{field.name: getattr(rows, field.name)[list(places)] for field in fields(ShardRows)})


def rows_sha256(rows: ShardRows) -> str:
    """Digest of all that the rows say, whatever file they are stored in."""
    whole = hashlib.sha256()
    for field in fields(rows):
        column = getattr(rows, field.name)
        content = "\0".join(column).encode() if field.name in STRINGS else np.ascontiguousarray(column).tobytes()
        whole.update(f"{field.name} {column.shape} {len(content)}\n".encode() + content)
    return whole.hexdigest()
