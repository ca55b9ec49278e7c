"""The token store's own shard format: a Zarr v3 group in a zip file, with one array per column of the rows."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts.codes import Dtype
from ..artifacts.zipped_zarr import Column, ZippedZarr
from .rows import COLUMNS, STRINGS, ShardRows, Strings, empty_rows

if TYPE_CHECKING:
    from zarr.codecs import BloscCodec, ZstdCodec

ROWS_PER_CHUNK = 1024
_EPOCH_OF_ZIP = (1980, 1, 1, 0, 0, 0)


def token_codec(itemsize: int) -> "BloscCodec":
    """The codec of tokens of so many bytes: the smallest that benchmarks/storage.py measured.

    Tokens hardly repeat, but only log2(K) of their bits vary.
    """
    from zarr.codecs import BloscCodec

    return BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle", typesize=itemsize)


def other_codec() -> "ZstdCodec":
    """The codec of all other columns."""
    from zarr.codecs import ZstdCodec

    return ZstdCodec(level=19)


def write_zarr(path: Path, rows: ShardRows, attributes: dict[str, Any]) -> None:
    """Writes the rows as a zipped Zarr group with these attributes; the same rows always give the same bytes."""
    # Only the writing of shards needs zarr, whose import takes a second.
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes=attributes)
    for name in COLUMNS:
        data = getattr(rows, name)
        chunks = (min(max(len(data), 1), ROWS_PER_CHUNK), *data.shape[1:])
        dtype = str if name in STRINGS else data.dtype
        # Zarr does not checksum chunks unless told to.
        codecs = [token_codec(data.itemsize) if name == "tokens" else other_codec(), Crc32cCodec()]
        array = group.create_array(name, shape=data.shape, chunks=chunks, dtype=dtype, compressors=codecs)
        array[:] = data
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(files):
            # Chunks are compressed already.
            compression = zipfile.ZIP_DEFLATED if file.endswith("zarr.json") else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(file, _EPOCH_OF_ZIP), files[file].to_bytes(), compression)


def read_zarr(data: bytes, images: int, views: int, grid: tuple[int, int], dtype: Dtype) -> ShardRows:
    """The rows of a zipped Zarr group, from the bytes of the whole file; class names are in the shard's entry.

    Raises ValueError unless it holds `images` rows with `views` views and `grid` (H, W) tokens of `dtype` per view, as
    `write_zarr` writes them.
    """
    group = ZippedZarr(data, _columns(images, views, grid, dtype))
    return ShardRows(**{name: group.read(name) for name in COLUMNS}, classes=None)


def read_zarr_keys(data: bytes, images: int, views: int, grid: tuple[int, int], dtype: Dtype) -> Strings:
    """The keys (n,) alone, without decoding the other columns; as `read_zarr`."""
    return ZippedZarr(data, _columns(images, views, grid, dtype)).read("keys")


def _columns(images: int, views: int, grid: tuple[int, int], dtype: Dtype) -> dict[str, Column]:
    """Shape and type of each column."""
    empty = empty_rows(views, grid, dtype)
    columns = {name: getattr(empty, name) for name in COLUMNS}
    return {
        name: Column((images, *column.shape[1:]), "string" if name in STRINGS else column.dtype.name)
        for name, column in columns.items()
    }
