"""The rows of a token shard in memory: one row per image."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts.codes import UINT16, Dtype, Tokens
from ..labels.columns import NO_LABEL as NO_LABEL
from ..labels.columns import from_column, to_column
from ..labels.parsing import Label

_LARGEST = 1 << 62
STRINGS = ("keys", "paths")
"""The columns of text; all others are numbers."""
Strings = NDArray[np.object_]
"""An array of Python strings."""


@dataclass(frozen=True, eq=False)
class ShardRows:
    """The rows of one shard, in the source's order: n images with V views each, and H x W tokens per view."""

    keys: Strings
    """(n,) str: WebDataset keys."""
    tokens: Tokens
    """(n, V, H, W) uint16 or uint32 (`artifacts.codes.token_dtype`)."""
    crops: NDArray[np.float64]
    """(n, V, 4) float64: top, left, height, width in upright source pixels."""
    flips: NDArray[np.bool_]
    """(n, V) bool: mirrored left to right after the crop."""
    sizes: NDArray[np.int32]
    """(n, 2) int32: height, width of the upright image in pixels."""
    labels: NDArray[np.int64]
    """(n,) int64: class numbers, or indices of `classes`; -1 for an image without a label."""
    paths: Strings
    """(n,) str: path inside a folder source; empty for tars."""
    offsets: NDArray[np.int64]
    """(n,) int64: where the image's bytes begin in its file."""
    lengths: NDArray[np.int64]
    """(n,) int64: bytes."""
    crc32: NDArray[np.uint32]
    """(n,) uint32: of the image's bytes."""
    classes: tuple[str, ...] | None = None
    """The class names of the shard, sorted, that `labels` are indices of; None if labels are class numbers."""

    def label(self, row: int) -> Label | None:
        """The label of one image: its class's number or name; None for an image without one."""
        return from_column(self.labels[row], self.classes)

    def __len__(self) -> int:
        return len(self.keys)


COLUMNS = tuple(field.name for field in fields(ShardRows) if field.name != "classes")
"""The arrays of `ShardRows`."""


def empty_rows(views: int, grid: tuple[int, int], dtype: Dtype = UINT16) -> ShardRows:
    """No rows, with `views` views and `grid` (H, W) tokens of type `dtype` per view."""
    return ShardRows(
        keys=np.empty(0, dtype=object),
        tokens=np.empty((0, views, *grid), dtype=dtype),
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
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    if all(part.classes is None for part in parts):
        return ShardRows(**columns, classes=None)
    labels, classes = to_column([part.label(row) for part in parts for row in range(len(part))])
    return ShardRows(**{**columns, "labels": labels}, classes=classes)


def take_rows(rows: ShardRows, places: Sequence[int]) -> ShardRows:
    """The rows at `places`, in the order of `places`."""
    columns: dict[str, Any] = {name: getattr(rows, name)[list(places)] for name in COLUMNS}
    return ShardRows(**columns, classes=rows.classes)


def check_rows(rows: ShardRows, images: int, source_bytes: int | None) -> None:
    """Checks what a shard's rows say about their images, whatever file they were read from.

    Args:
        rows: the rows; shapes and types are those of `ShardRows`.
        images: how many there must be.
        source_bytes: bytes of the tar or folder that the images are in, or None if that is not known.

    Raises:
        ValueError for a wrong number of rows, a path that leads out of its folder, an image that lies outside of its
        file, or a crop that is empty or not finite.
    """
    if len(rows) != images:
        raise ValueError(f"{len(rows)} rows instead of {images}")
    for path in set(rows.paths):
        if path and (path.startswith("/") or ".." in path.split("/") or "\0" in path):
            raise ValueError(f"path {path[:200]!r}, which leads out of the folder of images")
    if not len(rows):
        return
    last = _LARGEST if source_bytes is None else source_bytes
    if rows.offsets.min() < 0 or rows.lengths.min() < 0 or (rows.lengths > last - np.minimum(rows.offsets, last)).any():
        raise ValueError("an image that lies outside of its file")
    if not np.isfinite(rows.crops).all() or rows.crops[..., 2:].min(initial=1) <= 0 or rows.sizes.min() <= 0:
        raise ValueError("a crop or an image without a size")


def rows_sha256(rows: ShardRows) -> str:
    """Hex SHA-256 of all columns and of the class names, whatever file they are stored in."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        column = getattr(rows, name)
        content = "\0".join(column).encode() if name in STRINGS else np.ascontiguousarray(column).tobytes()
        digest.update(f"{name} {column.shape} {len(content)}\n".encode() + content)
    if rows.classes is not None:
        content = "\0".join(rows.classes).encode()
        digest.update(f"classes {len(rows.classes)} {len(content)}\n".encode() + content)
    return digest.hexdigest()
