"""The token store's own format: a shard's rows as one Zarr v3 group in a zip file, one array a column."""

import io
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import zarr
from zarr.buffer.cpu import Buffer
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from .rows import STRINGS, ShardRows

# What benchmarks/storage.py measured as smallest: tokens have hardly a repeat to find, but of their 16 bits only
# log2(K) vary.
TOKEN_CODEC = BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle", typesize=2)
OTHER_CODEC = ZstdCodec(level=19)
ROWS_PER_CHUNK = 1024
_EPOCH_OF_ZIP = (1980, 1, 1, 0, 0, 0)


def write_zarr(path: Path, rows: ShardRows, attributes: dict[str, Any]) -> None:
    """Writes the rows as a zipped Zarr group with these attributes; the same rows always give the same bytes."""
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes=attributes)
    for field in fields(rows):
        data = getattr(rows, field.name)
        chunks = (min(max(len(data), 1), ROWS_PER_CHUNK), *data.shape[1:])
        kind = str if field.name in STRINGS else data.dtype
        # Zarr leaves chunks unchecked unless told otherwise.
        codecs = [TOKEN_CODEC if field.name == "tokens" else OTHER_CODEC, Crc32cCodec()]
        array = group.create_array(field.name, shape=data.shape, chunks=chunks, dtype=kind, compressors=codecs)
        array[:] = data
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(files):
            # Chunks are compressed already.
            how = zipfile.ZIP_DEFLATED if name.endswith("zarr.json") else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name, _EPOCH_OF_ZIP), files[name].to_bytes(), how)


def read_zarr(data: bytes) -> ShardRows:
    """The rows of a zipped Zarr group, from the bytes of the whole file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: Buffer.from_bytes(archive.read(name)) for name in archive.namelist()}
    group = zarr.open_group(MemoryStore(files), mode="r")
    columns = {field.name: group[field.name][:] for field in fields(ShardRows)}
    return ShardRows(**{k: v.astype(object) if k in STRINGS else v for k, v in columns.items()})
