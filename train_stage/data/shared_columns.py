"""Columns of what is known of each image, in one file that all processes of a node map into memory.

The file lies in the temporary folder (TMPDIR) and has no name once every process has opened it, so that nothing is left
behind, however the processes end. Worker processes inherit the mapping; nothing is copied or pickled.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from ...shared.errors import DataError
from ...shared.runtime.distributed import World, local_rank

_ALIGNMENT = 64
T = TypeVar("T")


class Place(NamedTuple):
    """Where a column lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class ColumnWriter:
    """Writes columns to an unbuffered file one after the other, or piece by piece into room reserved for them."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.places: dict[str, Place] = {}
        self._end = 0

    def reserve(self, name: str, dtype: str, *shape: int) -> None:
        """Room for a column; what is not written of it reads as zeros and takes no room on disk."""
        self.places[name] = Place(dtype, shape, self._end)
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        self._end += -(-size // _ALIGNMENT) * _ALIGNMENT

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes the rows `start`, `start` + 1, ... of a column."""
        dtype, shape, offset = self.places[name]
        row = int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(dtype).itemsize
        self.file.seek(offset + start * row)
        rest = np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8).data
        while len(rest):
            rest = rest[self.file.write(rest) :]

    def add(self, name: str, values: np.ndarray) -> None:
        """Writes a whole column."""
        self.reserve(name, values.dtype.str, *values.shape)
        self.write(name, 0, values)

    def add_strings(self, name: str, blocks: Sequence[bytes], lengths: np.ndarray) -> None:
        """Writes the texts that stand one after the other in `blocks` as the columns `name` and `name`_ends."""
        self.reserve(name, "|u1", sum(map(len, blocks)))
        start = 0
        for block in blocks:
            self.write(name, start, np.frombuffer(block, dtype=np.uint8))
            start += len(block)
        self.add(f"{name}_ends", np.cumsum(lengths, dtype=np.int64))

    def finish(self, rows: int, *names: str) -> dict[str, Place]:
        """Where all columns lie; those called `names` have `rows` rows of what was reserved."""
        self.file.truncate(self._end + 1)  # a mapping must not be empty
        for name in names:
            dtype, shape, offset = self.places[name]
            self.places[name] = Place(dtype, (rows, *shape[1:]), offset)
        return self.places


def text_at(text: np.ndarray, ends: np.ndarray, index: int) -> str:
    """The text number `index` of two columns that `ColumnWriter.add_strings` wrote."""
    return text[ends[index - 1] if index else 0 : ends[index]].tobytes().decode()


def shared_columns(
    build: Callable[[BinaryIO], tuple[dict[str, Place], T]], world: World
) -> tuple[dict[str, np.ndarray], T]:
    """The columns that `build` writes in each node's first process, read-only, and what else it returns.

    Raises DataError if the temporary folder has no room, and whatever `build` raises.
    """
    if world.size == 1:
        with tempfile.TemporaryFile(prefix="mapet-", buffering=0) as file:
            places, more = _built(build, file)
            return _mapped(file, places), more
    path, own = None, None
    try:
        if local_rank() == 0:
            number, name = tempfile.mkstemp(prefix="mapet-")
            os.close(number)
            path = Path(name)
        given = world.all_gather(world.all_or_raise(lambda: path and _built_at(path, build)))
        own = given[world.rank - local_rank()]
        columns = world.all_or_raise(lambda: _mapped_from(own[0], own[1]))
    finally:
        if path:
            path.unlink(missing_ok=True)
    return columns, own[2]


def _built_at(path: Path, build: Callable) -> tuple[Path, dict[str, Place], T]:
    with open(path, "wb", buffering=0) as file:
        return path, *_built(build, file)


def _built(build: Callable, file: BinaryIO) -> tuple[dict[str, Place], T]:
    try:
        return build(file)
    except OSError as error:
        if error.filename is not None:  # another file than ours
            raise
        raise DataError(
            f"The index of all images does not fit into the temporary folder {tempfile.gettempdir()} "
            f"({error.strerror}); make room there or set TMPDIR to another folder."
        ) from None


def _mapped_from(path: Path, places: dict[str, Place]) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            return _mapped(file, places)
    except OSError as error:
        raise DataError(
            f"{path}, which this node's first process wrote, cannot be read ({error.strerror}); give all processes of "
            "a node the same TMPDIR."
        ) from None


def _mapped(file: BinaryIO, places: dict[str, Place]) -> dict[str, np.ndarray]:
    whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return {name: np.ndarray(shape, dtype, whole, offset) for name, (dtype, shape, offset) in places.items()}
