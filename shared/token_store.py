"""The token store: every image's tokens and views in one Zarr v3 file per source shard, beside a manifest.

TOKENS/manifest.json         what is in the store, with a digest of every file; written last
TOKENS/codebook.json         the codebook that made the tokens (its centroids stay in the codebook)
TOKENS/shards/NAME.json      one shard's entry of the manifest, written when the shard is whole
TOKENS/shards/NAME.zarr.zip  the rows
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore, ZipStore

from .codebook import read_description
from .errors import DataError
from .files import read_sealed_json, sha256_file, write_sealed_json, written_whole

FORMAT, SHARD_FORMAT, VERSION = "mapet-token-store", "mapet-token-shard", 1
NO_LABEL = -1
_ROWS_PER_CHUNK = 1024
_EPOCH_OF_ZIP = (1980, 1, 1, 0, 0, 0)


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


_STRINGS = ("keys", "paths")


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


def write_shard(store: Path, name: str, rows: ShardRows, attributes: dict[str, Any]) -> None:
    """Writes one shard and then its entry; the same rows always give the same bytes."""
    final = store / "shards" / f"{name}.zarr.zip"
    with written_whole(final) as partial:
        _zip(_zarr_files(rows, {"format": SHARD_FORMAT, "version": VERSION, **attributes}), partial)
    entry = {
        "name": name,
        "file": f"shards/{final.name}",
        "bytes": final.stat().st_size,
        "sha256": sha256_file(final),
        "images": len(rows),
        **attributes,
    }
    write_sealed_json(entry_path(store, name), {"format": SHARD_FORMAT, "version": VERSION, **entry})


def entry_path(store: Path, name: str) -> Path:
    """Where the entry of shard `name` lies; it exists exactly when the shard is whole."""
    return store / "shards" / f"{name}.json"


def read_entry(store: Path, name: str) -> dict[str, Any]:
    """The manifest entry of one whole shard; DataError if it is missing or was changed."""
    entry = read_sealed_json(entry_path(store, name), format=SHARD_FORMAT, version=VERSION)
    return {key: value for key, value in entry.items() if key not in ("format", "version")}


def _zarr_files(rows: ShardRows, attributes: dict[str, Any]) -> dict[str, bytes]:
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes=attributes)
    # Zarr leaves chunks unchecked unless told otherwise.
    codecs = [ZstdCodec(level=9), Crc32cCodec()]
    for field in fields(rows):
        data = getattr(rows, field.name)
        chunks = (min(max(len(data), 1), _ROWS_PER_CHUNK), *data.shape[1:])
        kind = str if field.name in _STRINGS else data.dtype
        array = group.create_array(field.name, shape=data.shape, chunks=chunks, dtype=kind, compressors=codecs)
        array[:] = data
    return {name: buffer.to_bytes() for name, buffer in files.items()}


def _zip(files: dict[str, bytes], path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH_OF_ZIP), files[name])


def _read_zarr(path: Path) -> ShardRows:
    with ZipStore(path, mode="r") as archive:
        group = zarr.open_group(archive, mode="r")
        columns = {field.name: group[field.name][:] for field in fields(ShardRows)}
    return ShardRows(**{k: v.astype(object) if k in _STRINGS else v for k, v in columns.items()})


def read_shard(store: Path, entry: dict[str, Any]) -> ShardRows:
    """The rows of the shard that `entry` describes; DataError if its file is missing, cut or changed."""
    path = store / entry["file"]
    problem = _damage(path, entry)
    if problem:
        raise DataError(f"{problem}; delete it and its .json and give the same encode-shards command again.")
    return _read_zarr(path)


def _damage(path: Path, entry: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    if sha256_file(path) != entry["sha256"]:
        return f"{path} was changed since it was written (its digest does not match)"
    return None


def write_manifest(store: Path, description: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Assembles the manifest from the entries of all shards; the last write of an encoding."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "codebook_fingerprint": description["fingerprint"],
        "codebook_sha256": sha256_file(store / "codebook.json"),
        "k": description["k"],
        "grid": description["grid"],
        "images": sum(entry["images"] for entry in entries),
        "shards": entries,
    }
    write_sealed_json(store / "manifest.json", content)


class TokenStore:
    """A finished token store, opened for reading.

    Raises DataError when opened or read if a file is missing, was changed, or is of another version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(f"{self.path} does not exist or is no folder; give what encode-shards wrote with --out.")
        if not (self.path / "manifest.json").exists():
            raise DataError(
                f"{self.path} has no manifest.json: it is no token store, or its encoding did not finish; "
                "give the same encode-shards command again."
            )
        self.manifest = read_sealed_json(self.path / "manifest.json", format=FORMAT, version=VERSION)
        self.codebook = read_description(self.path / "codebook.json")
        self.entries = {entry["name"]: entry for entry in self.manifest["shards"]}
        self._cached_rows = lru_cache(maxsize=4)(self.read_rows)

    @property
    def fingerprint(self) -> str:
        """Of the codebook that made the tokens."""
        return self.manifest["codebook_fingerprint"]

    @property
    def k(self) -> int:
        return self.manifest["k"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of one image's tokens."""
        height, width = self.manifest["grid"]
        return height, width

    def __len__(self) -> int:
        return self.manifest["images"]

    def __repr__(self) -> str:
        shards, (rows, columns) = len(self.entries), self.grid
        return f"TokenStore({str(self.path)!r}: {len(self)} images, {shards} shards, K={self.k}, {rows}x{columns})"

    @property
    def view(self) -> dict[str, Any]:
        """Which views are stored (`shared.views.ViewPolicy.to_json`)."""
        return next(iter(self.entries.values()))["view"]

    @property
    def views(self) -> int:
        """How many views of an image are stored."""
        return self.view["views"]

    def skipped(self) -> list[tuple[str, str, str]]:
        """(shard, key, reason) of everything that was left out with --on-error skip."""
        return [(name, key, reason) for name, entry in self.entries.items() for key, reason in entry.get("skipped", ())]

    def read_rows(self, name: str) -> ShardRows:
        """All rows of one shard, after its bytes were checked against the manifest."""
        return read_shard(self.path, self.entries[name])

    def shards(self) -> Iterator[tuple[str, ShardRows]]:
        """(name, rows) of every shard, one in memory at a time."""
        for name in self.entries:
            yield name, self.read_rows(name)

    def find(self, key: str) -> tuple[ShardRows, int]:
        """The shard's rows and the row that holds `key`; DataError if no image has it."""
        for name in self.entries:
            rows = self._cached_rows(name)
            at = np.flatnonzero(rows.keys == key)
            if len(at):
                return rows, int(at[0])
        raise DataError(f"{self.path} has no image with key {key!r}.")
