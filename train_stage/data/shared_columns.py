"""Columns of per-image metadata in one file that all processes of a node map into memory.

The file lies in the temporary folder (TMPDIR) and is unlinked once every process has opened it, so that nothing is left
behind however the processes end. Loader workers inherit the mapping; nothing is copied or pickled.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ...shared.errors import DataError
from ...shared.runtime.distributed import World, local_rank

_ALIGNMENT = 64
T = TypeVar("T")
Column = NDArray[Any]
"""One value or array per row, of any dtype."""


class Place(NamedTuple):
    """Dtype, shape and byte offset of a column in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class ColumnWriter:
    """Writes columns to an unbuffered file, one after the other or in pieces into reserved space."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.places: dict[str, Place] = {}
        self._end = 0

    def reserve(self, name: str, dtype: str, *shape: int) -> None:
        """Reserves space for a column; what is never written reads as zeros and takes no space on disk."""
        self.places[name] = Place(dtype, shape, self._end)
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._end += -(-size // _ALIGNMENT) * _ALIGNMENT

    def write(self, name: str, start: int, values: Column) -> None:
        """Writes rows of a column from row `start` on."""
        dtype, shape, offset = self.places[name]
        row = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
        self.file.seek(offset + start * row)
        rest = np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8).data
        while len(rest):
            rest = rest[self.file.write(rest) :]

    def add(self, name: str, values: Column) -> None:
        """Writes a whole column."""
        self.reserve(name, values.dtype.str, *values.shape)
        self.write(name, 0, values)

    def add_strings(self, name: str, blocks: Sequence[bytes], lengths: NDArray[np.int64]) -> None:
        """Writes strings, concatenated in `blocks` as UTF-8, as the columns `name` and `name`_ends."""
        self.reserve(name, "|u1", sum(map(len, blocks)))
        start = 0
        for block in blocks:
            self.write(name, start, np.frombuffer(block, dtype=np.uint8))
            start += len(block)
        self.add(f"{name}_ends", np.cumsum(lengths, dtype=np.int64))

    def finish(self, rows: int, *names: str) -> dict[str, Place]:
        """The places of all columns; of those called `names` the first `rows` rows are kept."""
        self.file.truncate(self._end + 1)  # a mapping must not be empty
        for name in names:
            dtype, shape, offset = self.places[name]
            self.places[name] = Place(dtype, (rows, *shape[1:]), offset)
        return self.places


def text_at(text: NDArray[np.uint8], ends: NDArray[np.int64], index: int) -> str:
    """String number `index` of two columns that `ColumnWriter.add_strings` wrote."""
    # Keys are UTF-8; a path may hold other bytes.
    return bytes(text[ends[index - 1] if index else 0 : ends[index]]).decode("utf-8", "surrogateescape")


def shared_columns(
    build: Callable[[BinaryIO], tuple[dict[str, Place], T]], world: World
) -> tuple[dict[str, Column], T]:
    """The columns that `build` writes in the first process of each node, read-only, and its second return value.

    Raises DataError if the temporary folder is full, and whatever `build` raises.
    """
    if world.size == 1:
        with tempfile.TemporaryFile(prefix="mapet-", buffering=0) as temporary:
            file = cast(BinaryIO, temporary)  # unbuffered: FileIO
            places, result = _built(build, file)
            return _mapped(file, places), result
    path: Path | None = None
    try:
        if local_rank() == 0:
            number, name = tempfile.mkstemp(prefix="mapet-")
            os.close(number)
            path = Path(name)
        built = world.all_gather(world.all_or_raise(lambda: _built_at(path, build) if path else None))
        node = built[world.rank - local_rank()]
        assert node is not None  # the first process of each node has built the columns
        columns = world.all_or_raise(lambda: _mapped_from(node.path, node.places))
    finally:
        if path:
            path.unlink(missing_ok=True)
    return columns, node.result


@dataclass(frozen=True)
class _BuiltColumns(Generic[T]):
    path: Path
    places: dict[str, Place]
    result: T


def _built_at(path: Path, build: Callable[[BinaryIO], tuple[dict[str, Place], T]]) -> _BuiltColumns[T]:
    with open(path, "wb", buffering=0) as file:
        return _BuiltColumns(path, *_built(build, cast(BinaryIO, file)))


def _built(build: Callable[[BinaryIO], tuple[dict[str, Place], T]], file: BinaryIO) -> tuple[dict[str, Place], T]:
    try:
        return build(file)
    except OSError as error:
        if error.filename is not None:  # an error about another file
            raise
        raise DataError(
            f"The index of all images does not fit into the temporary folder {tempfile.gettempdir()} "
            f"({error.strerror}); make room there or set TMPDIR to another folder."
        ) from None


def _mapped_from(path: Path, places: dict[str, Place]) -> dict[str, Column]:
    try:
        with open(path, "rb") as file:
            return _mapped(file, places)
    except OSError as error:
        raise DataError(
            f"{path}, written by the first process of this node, cannot be read ({error.strerror}); give all processes "
            "of a node the same TMPDIR."
        ) from None


def _mapped(file: BinaryIO, places: dict[str, Place]) -> dict[str, Column]:
    whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {name: np.ndarray(shape, dtype, whole, offset) for name, (dtype, shape, offset) in places.items()}
