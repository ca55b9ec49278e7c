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

import google_crc32c
import msgspec
import numpy as np
from msgspec import Struct
from numcodecs.blosc import decompress as blosc_decompress
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import decompress as zstd_decompress
from numpy.typing import NDArray

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
        self._arrays = {name: _decoded(self._file(f"{name}/zarr.json"), _Array, name) for name in columns}
        self._chunks = {name: self._checked_array(name, column) for name, column in columns.items()}

    def read(self, name: str) -> NDArray[Any]:
        """One column, with the shape and type that it must have.

        Chunks are decoded here and not by zarr, whose event loop takes ten times as long for a column of a shard.
        """
        column, described = self._columns[name], self._arrays[name]
        rows = self._chunks[name]
        parts = [_chunk(self._files.get(key), key, described, column, rows) for key in _all_chunks(name, column, rows)]
        return np.concatenate([_fill(column, 0), *parts])[: column.shape[0]]

    def _file(self, name: str) -> bytes:
        if name not in self._files:
            raise ValueError(f"no {name}")
        return self._files[name]

    def _checked_array(self, name: str, column: Column) -> int:
        """Checks the metadata of a column and returns how many rows a chunk has."""
        described = self._arrays[name]
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
        allowed = set(_all_chunks(name, column, rows))
        stray = [key for key in self._files if key.startswith(f"{name}/c/") and key not in allowed]
        if stray:
            raise ValueError(f"{stray[0][:100]!r}, which is no chunk of {name}")
        return rows


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


def _all_chunks(name: str, column: Column, rows: int) -> Iterator[str]:
    """The key of each chunk; all hold as many rows, the last one padded ones."""
    rest = "/".join("0" for _ in column.shape[1:])
    for number in range(-(-column.shape[0] // rows)):
        yield "/".join(filter(None, (name, "c", str(number), rest)))


def _chunk(content: bytes | None, key: str, described: _Array, column: Column, rows: int) -> NDArray[Any]:
    """The values of a chunk; one that is not stored is all fill value."""
    if content is None:
        if described.fill_value:
            raise ValueError(f"{key} is missing, and its fill value is not zero or empty")
        return _fill(column, rows)
    _check_chunk(key, content, rows, column)
    packed = content[:-_CHECKSUM_BYTES]
    if google_crc32c.value(packed) != int.from_bytes(content[-_CHECKSUM_BYTES:], "little"):
        raise ValueError(f"{key} has another checksum than it states")
    try:
        raw = (zstd_decompress if described.codecs[1].name == "zstd" else blosc_decompress)(packed)
        values = VLenUTF8().decode(raw) if column.dtype == "string" else np.frombuffer(raw, _little_endian(column))
        return values.reshape(rows, *column.shape[1:])
    except Exception as error:  # each codec has errors of its own for bytes that it does not know
        raise ValueError(f"{key}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None


def _fill(column: Column, rows: int) -> NDArray[Any]:
    shape = (rows, *column.shape[1:])
    return np.full(shape, "", dtype=object) if column.dtype == "string" else np.zeros(shape, column.dtype)


def _little_endian(column: Column) -> np.dtype[Any]:
    return np.dtype(column.dtype).newbyteorder("<")


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
