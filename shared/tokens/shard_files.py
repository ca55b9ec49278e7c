"""The files of one shard of a token store: its rows, as a Zarr file or a tar, and its entry.

Only this module depends on the storage format that an entry names.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from ..artifacts.codes import UINT16, Dtype
from ..artifacts.fields import checked
from ..artifacts.schemas import ShardEntry
from ..errors import DataError
from ..sources.records import ImageRecord
from ..storage.bounded import file_inside
from ..storage.files import read_sealed_json, sha256_file, write_sealed_json, written_whole
from ..storage.remote import exists, explained, file_size, is_remote, on_this_disk, read_whole
from .rows import NO_LABEL, ShardRows, Strings, check_rows, rows_sha256
from .tar_shard import read_tar, write_tar
from .zarr_shard import read_zarr, read_zarr_keys, write_zarr

SHARD_FORMAT, VERSION = "mapet-token-shard", 2
ZARR, WEBDATASET = "zarr", "webdataset"
SUFFIXES = {ZARR: ".zarr.zip", WEBDATASET: ".tar"}
"""The storage formats of a shard, and the suffixes of their files."""
_AGAIN = "delete it and its .json and give the same encode-shards command again"


def write_shard(
    store: Path | UPath,
    name: str,
    rows: ShardRows,
    attributes: dict[str, Any],
    images: Sequence[ImageRecord] | None = None,
) -> None:
    """Writes the file of one shard and then its entry; the same rows always give the same bytes.

    `attributes` go into the entry: `codebook_fingerprint` (of the tokenizer), `view` (`ViewPolicy.to_json`) and
    `source` (`SourceShard.describe`); the class names of the rows become its `classes`. With `images`, the records of
    the rows in the same order, the shard is a tar that contains the images as well; without, a Zarr file. Raises
    DataError if the store cannot be written.
    """
    storage = ZARR if images is None else WEBDATASET
    views, height, width = rows.tokens.shape[1:]
    path = store / "shards" / f"{name}{SUFFIXES[storage]}"
    entry: dict[str, Any] = {
        "name": name,
        "file": f"shards/{path.name}",
        "storage": storage,
        "images": len(rows),
        "grid": [height, width],
    }
    dtype: Dtype = "uint32" if rows.tokens.dtype == np.uint32 else UINT16
    if dtype != UINT16:
        entry["dtype"] = dtype
    with written_whole(path) as partial:
        if images is None:
            write_zarr(partial, rows, {"format": SHARD_FORMAT, "version": VERSION, **attributes})
        else:
            write_tar(partial, rows, images, attributes["codebook_fingerprint"])
            rows = read_tar(partial, views, (height, width), dtype)
            entry["rows_sha256"] = rows_sha256(rows)
        entry |= {"bytes": partial.stat().st_size, "sha256": sha256_file(partial)}
    if rows.classes is not None:
        entry["classes"] = list(rows.classes)
    content = {"format": SHARD_FORMAT, "version": VERSION, **entry, **attributes}
    write_sealed_json(entry_path(store, name), content)


def entry_path(store: Path | UPath, name: str) -> Path | UPath:
    """The path of a shard's entry; the file exists exactly when the shard is complete."""
    return store / "shards" / f"{name}.json"


def read_entry(store: Path | UPath, name: str) -> dict[str, Any]:
    """The manifest entry of one complete shard; DataError if it is missing, was changed or is of something else."""
    path = entry_path(store, name)
    content = read_sealed_json(path, format=SHARD_FORMAT, version=VERSION)
    entry = {key: value for key, value in content.items() if key not in ("format", "version")}
    fields = checked(entry, ShardEntry, path)
    refuse_other_file(fields, path)
    if fields.name != name:
        raise DataError(f"{path} is the entry of another shard, {fields.name!r}; delete it and give the command again.")
    return entry


def refuse_other_file(entry: ShardEntry, path: Path | UPath) -> None:
    """Raises DataError, which names the file `path`, unless an entry's file is the one that its name implies."""
    expected = f"shards/{entry.name}{SUFFIXES[entry.storage]}"
    if entry.file != expected or ".." in entry.name.split("/"):
        raise DataError(
            f"{path}: the file of shard {entry.name!r} is {entry.file!r}, not {expected!r}; restore it or make it "
            "again."
        )


def stored_entries(store: Path | UPath) -> dict[str, dict[str, Any]]:
    """The entries of all complete shards by name, whether or not the manifest lists them."""
    with explained(store):
        names = sorted(path.name.removesuffix(".json") for path in (store / "shards").glob("[!.]*.json"))
    return {name: read_entry(store, name) for name in names}


def shard_files(store: Path | UPath) -> set[str]:
    """Paths, relative to the store, of all shard files in it, with or without an entry.

    Empty for a web server that does not list folders.
    """
    try:
        with explained(store):
            names = [path.name for path in (store / "shards").glob("*")]
    except DataError:
        return set()
    return {f"shards/{name}" for name in names if name.endswith(tuple(SUFFIXES.values()))}


def read_shard(store: Path | UPath, entry: dict[str, Any], every_byte: bool = False) -> ShardRows:
    """The rows of the shard that `entry` describes; DataError if its file is missing, truncated or changed.

    Without `every_byte` the images inside a tar are neither read nor checked; everything else always is.
    """
    with _checked_file(store, entry) as path:
        if entry["storage"] == ZARR:
            rows = _named_classes(path, read_zarr(_checked_bytes(path, entry), *_sizes(entry)), entry)
        else:
            rows = _read_tar_shard(path, entry, every_byte)
        check_rows(rows, entry["images"], _bytes_of_images(entry))
        return rows


def read_shard_keys(store: Path | UPath, entry: dict[str, Any]) -> Strings:
    """The keys (n,) of a shard, checked as `read_shard` checks its rows; a Zarr file's other columns stay encoded."""
    with _checked_file(store, entry) as path:
        if entry["storage"] == ZARR:
            return read_zarr_keys(_checked_bytes(path, entry), *_sizes(entry))
        return _read_tar_shard(path, entry, every_byte=False).keys


def _bytes_of_images(entry: dict[str, Any]) -> int | None:
    """Bytes of the file or folder that the rows' offsets are in, or None if the entry does not state them."""
    if entry["storage"] != ZARR:
        return int(entry["bytes"])
    source = entry["source"]
    # Offsets in a tar inside a tar count from the start of the outer one.
    return None if source["kind"] == "tar in tar" else source["size"]


def _sizes(entry: dict[str, Any]) -> tuple[int, int, tuple[int, int], Dtype]:
    """Images, views, rows and columns of the grid, and the type of the tokens."""
    height, width = entry["grid"]
    return entry["images"], entry["view"]["views"], (height, width), entry.get("dtype", UINT16)


def _named_classes(path: Path | UPath, rows: ShardRows, entry: dict[str, Any]) -> ShardRows:
    """The rows with the class names of the entry, which every label must have."""
    classes = entry.get("classes")
    if classes is None:
        return rows
    if len(rows) and not NO_LABEL <= int(rows.labels.min()) <= int(rows.labels.max()) < len(classes):
        raise DataError(f"{path} has labels that are not among the {len(classes)} classes of its entry")
    return replace(rows, classes=tuple(classes))


@contextmanager
def _checked_file(store: Path | UPath, entry: dict[str, Any]) -> Iterator[Path | UPath]:
    """Yields the path of a shard's file if it has the expected size; errors about it say how to restore it."""
    path = file_inside(store, entry["file"])
    try:
        if not exists(path):
            raise DataError(f"{path} is missing")
        size = file_size(path)
        if size != entry["bytes"]:
            raise DataError(f"{path} has {size} bytes instead of {entry['bytes']}")
        yield path
    except (OSError, MemoryError) as error:
        raise DataError(f"{path} cannot be read ({error}); make it readable, or free memory.") from None
    except ValueError as error:
        raise DataError(f"{path} does not hold the rows that its entry describes ({error}); {_AGAIN}.") from None
    except DataError as error:
        raise DataError(f"{error}; {_AGAIN}.") from None


def _checked_bytes(path: Path | UPath, entry: dict[str, Any]) -> bytes:
    content = read_whole(path)
    _refuse_changed(path, hashlib.sha256(content).hexdigest(), entry["sha256"])
    return content


def _read_tar_shard(path: Path | UPath, entry: dict[str, Any], every_byte: bool) -> ShardRows:
    with on_this_disk(path) as local:
        if every_byte or is_remote(path):
            _refuse_changed(path, sha256_file(local), entry["sha256"])
        rows = read_tar(local, *_sizes(entry)[1:])
    _refuse_changed(path, rows_sha256(rows), entry["rows_sha256"])
    return rows


def _refuse_changed(path: Path | UPath, digest: str, expected: str) -> None:
    if digest != expected:
        raise DataError(f"{path} was changed since it was written (its digest does not match)")
