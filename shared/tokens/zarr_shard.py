"""The token store's own shard format: a Zarr v3 group in a zip file, with one array per column of the rows."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.buffer.cpu import Buffer
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from .rows import COLUMNS, STRINGS, ShardRows, Strings

# The smallest that benchmarks/storage.py measured: tokens hardly repeat, but only log2(K) of their 16 bits vary.
TOKEN_CODEC = BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle", typesize=2)
OTHER_CODEC = ZstdCodec(level=19)
ROWS_PER_CHUNK = 1024
_EPOCH_OF_ZIP = (1980, 1, 1, 0, 0, 0)


def write_zarr(path: Path, rows: ShardRows, attributes: dict[str, Any]) -> None:
    """Writes the rows as a zipped Zarr group with these attributes; the same rows always give the same bytes."""
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes=attributes)
    for name in COLUMNS:
        data = getattr(rows, name)
        chunks = (min(max(len(data), 1), ROWS_PER_CHUNK), *data.shape[1:])
        dtype = str if name in STRINGS else data.dtype
        # Zarr does not checksum chunks unless told to.
        codecs = [TOKEN_CODEC if name == "tokens" else OTHER_CODEC, Crc32cCodec()]
        array = group.create_array(name, shape=data.shape, chunks=chunks, dtype=dtype, compressors=codecs)
        array[:] = data
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(files):
            # Chunks are compressed already.
            compression = zipfile.ZIP_DEFLATED if file.endswith("zarr.json") else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(file, _EPOCH_OF_ZIP), files[file].to_bytes(), compression)


def read_zarr(data: bytes) -> ShardRows:
    """The rows of a zipped Zarr group, from the bytes of the whole file; class names are in the shard's entry."""
    group = _open_group(data)
    columns: dict[str, Any] = {name: _column(group, name) for name in COLUMNS}
    return ShardRows(**columns)


def read_zarr_keys(data: bytes) -> Strings:
    """The keys (n,) alone, without decoding the other columns."""
    return _column(_open_group(data), "keys")


def _open_group(data: bytes) -> zarr.Group:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files: dict[str, Any] = {name: Buffer.from_bytes(archive.read(name)) for name in archive.namelist()}
    return zarr.open_group(MemoryStore(files), mode="r")


def _column(group: zarr.Group, name: str) -> NDArray[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    column = np.asarray(array[:])
    return column.astype(object) if name in STRINGS else column
