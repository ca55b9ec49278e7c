"""Opens a zipped Zarr group from elsewhere: only the expected arrays, in Zarr format 3, by the codecs that mapet uses.

Everything that decides how much memory is taken is compared with what the caller expects before anything is decoded.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
import zarr
from msgspec import Struct
from numcodecs.zstd import decompress as zstd_decompress
from numpy.typing import NDArray
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from .fields import explained_field

_MOST_METADATA_BYTES = 4 << 20
"""The group's attributes list what was skipped."""
_MOST_BYTES, _MOST_RATIO = 256 << 20, 256
"""A shard may take this many bytes when it is decoded, or this multiple of its file: crc32 and offsets of each image do
not compress, so that even tokens that are all the same stay below it."""
_CHECKSUM_BYTES = 4
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_S = TypeVar("_S")


class Column(NamedTuple):
    """An array that must be in the group."""

    shape: tuple[int, ...]
    dtype: str
    """Of NumPy, such as "uint16"; "string" for text."""


class _Named(Struct):
    name: str
    configuration: dict[str, Any] = {}


class _Array(Struct):
    """NAME/zarr.json"""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: tuple[int, ...]
    data_type: str
    chunk_grid: _Named
    chunk_key_encoding: _Named
    codecs: list[_Named]
    fill_value: Any
    storage_transformers: list[Any] = []


class _Group(Struct):
    """zarr.json"""

    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: dict[str, Any] = {}


class ZippedZarr:
    """A zipped Zarr group of known columns.

    Raises ValueError if the content is anything but a zip file of a Zarr 3 group with exactly these columns, in chunks
    of whole rows, compressed by Blosc or Zstandard and checked by CRC32C.
    """

    def __init__(self, data: bytes, columns: Mapping[str, Column]) -> None:
        """Checks the files of the group `data`, the bytes of a zip file; no chunk is decoded yet."""
        self._columns = columns
        self._files = _unzipped(data, columns)
        needed = sum(_bytes_of(column) for column in columns.values())
        if needed > max(_MOST_BYTES, _MOST_RATIO * len(data)):
            raise ValueError(f"{needed:,} bytes of columns in a file of {len(data):,} bytes")
        _decoded(self._file("zarr.json"), _Group, "zarr.json")
        self._chunks = {name: self._checked_array(name, column) for name, column in columns.items()}

    def read(self, name: str) -> NDArray[Any]:
        """One column, with the shape and type that it must have."""
        column = self._columns[name]
        for key, rows in self._chunk_rows(name):
            _check_chunk(key, self._files[key], rows, column)
        files: dict[str, Any] = {
            key: Buffer.from_bytes(content)
            for key, content in self._files.items()
            if key == "zarr.json" or key.startswith(f"{name}/")
        }
        try:
            array = zarr.open_group(MemoryStore(files), mode="r", zarr_format=3)[name]
            assert isinstance(array, zarr.Array)
            values = np.asarray(array[:])
        except Exception as error:  # each codec has errors of its own for options and bytes that it does not know
            raise ValueError(f"{name}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None
        if column.dtype == "string":
            values = values.astype(object)
        elif values.dtype != np.dtype(column.dtype):
            raise ValueError(f"{name} of type {values.dtype}")
        if values.shape != column.shape:
            raise ValueError(f"{name} of shape {values.shape}")
        return values

    def _file(self, name: str) -> bytes:
        if name not in self._files:
            raise ValueError(f"no {name}")
        return self._files[name]

    def _checked_array(self, name: str, column: Column) -> int:
        """Checks the metadata of a column and returns how many rows a chunk has."""
        described = _decoded(self._file(f"{name}/zarr.json"), _Array, f"{name}/zarr.json")
        if described.shape != column.shape or described.data_type != column.dtype:
            raise ValueError(f"{name} of {described.data_type} {described.shape}, not {column.dtype} {column.shape}")
        if (described.chunk_grid.name, described.chunk_key_encoding) != (
            "regular",
            _Named("default", {"separator": "/"}),
        ):
            raise ValueError(f"{name} in chunks of another kind than regular ones")
        chunk = described.chunk_grid.configuration.get("chunk_shape")
        rows = chunk[0] if isinstance(chunk, list) and chunk else None
        whole = isinstance(chunk, list) and tuple(chunk[1:]) == column.shape[1:]
        if not whole or type(rows) is not int or not 1 <= rows <= max(column.shape[0], 1):
            raise ValueError(f"{name} in chunks of {str(chunk)[:100]}")
        _check_codecs(name, described, column)
        allowed = {key for key, _ in _all_chunks(name, column, rows)}
        stray = [key for key in self._files if key.startswith(f"{name}/c/") and key not in allowed]
        if stray:
            raise ValueError(f"{stray[0][:100]!r}, which is no chunk of {name}")
        return rows

    def _chunk_rows(self, name: str) -> Iterator[tuple[str, int]]:
        """The files of a column's chunks that exist, and the rows that each one holds; others are all fill value."""
        chunks = _all_chunks(name, self._columns[name], self._chunks[name])
        return ((key, rows) for key, rows in chunks if key in self._files)


def _unzipped(data: bytes, columns: Mapping[str, Column]) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            for member in members:
                _check_member(member, columns)
            if len({member.filename for member in members}) != len(members):
                raise ValueError("two files of one name in the zip")
            return {member.filename: archive.read(member) for member in members}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, RuntimeError, OSError) as error:
        raise ValueError(f"no readable zip file: {error}") from None


def _check_member(member: zipfile.ZipInfo, columns: Mapping[str, Column]) -> None:
    name, metadata = member.filename, member.filename.endswith("zarr.json")
    column = name.partition("/")[0]
    if not (name == "zarr.json" or (column in columns and name.startswith((f"{column}/zarr.json", f"{column}/c/")))):
        raise ValueError(f"{name[:100]!r} in the zip, which belongs to no column")
    packed = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
    if not (packed or (metadata and member.compress_type == zipfile.ZIP_DEFLATED)):
        raise ValueError(f"{name[:100]!r} in the zip is compressed in a way that mapet does not write")
    if metadata and member.file_size > _MOST_METADATA_BYTES + 64 * member.compress_size:
        raise ValueError(f"{name[:100]!r} in the zip has {member.file_size:,} bytes")


def _bytes_of(column: Column) -> int:
    size = 64 if column.dtype == "string" else np.dtype(column.dtype).itemsize
    return prod(column.shape) * size


def _all_chunks(name: str, column: Column, rows: int) -> Iterator[tuple[str, int]]:
    """The key of each chunk and the rows that it holds; the last one is padded to as many as the others."""
    rest = "/".join("0" for _ in column.shape[1:])
    for number in range(-(-column.shape[0] // rows)):
        yield "/".join(filter(None, (name, "c", str(number), rest))), rows


def _decoded(content: bytes, schema: type[_S], name: str) -> _S:
    try:
        return msgspec.json.decode(content, type=schema)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"{name}: {explained_field(error)}") from None


def _check_codecs(name: str, described: _Array, column: Column) -> None:
    """Refuses other codecs than: vlen-utf8 for text or bytes for numbers, then blosc or zstd, then crc32c."""
    first = "vlen-utf8" if column.dtype == "string" else "bytes"
    names = [codec.name for codec in described.codecs]
    if names not in ([first, "zstd", "crc32c"], [first, "blosc", "crc32c"]) or described.storage_transformers:
        raise ValueError(f"{name} with codecs {', '.join(names)[:100]}, which mapet does not write")
    if described.codecs[0].configuration.get("endian", "little") != "little":
        raise ValueError(f"{name} in bytes that are not little-endian")


def _check_chunk(key: str, content: bytes, rows: int, column: Column) -> None:
    """Compares the size that a compressed chunk states with the size that it must have."""
    packed = content[:-_CHECKSUM_BYTES]
    is_text = column.dtype == "string"
    stated = _stated_bytes(packed)
    if is_text:
        if stated > _MOST_METADATA_BYTES + _MOST_RATIO * len(packed):
            raise ValueError(f"{key} of {len(packed)} bytes that would become {stated:,}")
        if stated < 4 or struct.unpack_from("<I", zstd_decompress(packed))[0] != rows:
            raise ValueError(f"{key} holds another number of strings than {rows}")
    elif stated != rows * prod(column.shape[1:]) * np.dtype(column.dtype).itemsize:
        raise ValueError(f"{key} would become {stated:,} bytes")


def _stated_bytes(packed: bytes) -> int:
    """The decompressed size in the header of a Zstandard frame (RFC 8878) or a Blosc 1 block, else ValueError."""
    if packed[:4] == _ZSTD_MAGIC and len(packed) > 8:
        descriptor = packed[4]
        single, size_flag, dictionary = descriptor >> 5 & 1, descriptor >> 6, (0, 1, 2, 4)[descriptor & 3]
        width = (1 if single else 0, 2, 4, 8)[size_flag]
        at = 5 + (not single) + dictionary
        if width:
            return int.from_bytes(packed[at : at + width], "little") + (256 if width == 2 else 0)
    elif len(packed) >= 16 and packed[0] == 2 and int.from_bytes(packed[12:16], "little") == len(packed):
        return int.from_bytes(packed[4:8], "little")
    raise ValueError("a chunk that is neither Zstandard with its size nor Blosc")
