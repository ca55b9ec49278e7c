"""The token store: every image's tokens and views in one file per source shard, beside a manifest.

TOKENS/manifest.json         what is in the store, with a digest of every file; written last
TOKENS/codebook.json         the codebook that made the tokens (its centroids stay in the codebook)
TOKENS/shards/NAME.json      one shard's entry of the manifest, written when the shard is whole
TOKENS/shards/NAME.zarr.zip  the rows (`token_zarr`), or
TOKENS/shards/NAME.tar       the rows with their images (`token_tars`)

TOKENS is a local folder or a URL. The entry of a shard says how it is stored; no one but this module looks at that.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from upath import UPath

from ..errors import DataError, UsageError
from ..images.records import ImageRecord
from ..storage.files import read_sealed_json, sha256_file, write_sealed_json, written_whole
from ..storage.remote import as_path, exists, explained, file_size, is_remote, on_this_disk, read_whole
from .codebook import read_description
from .notebook import ImageTokens, facts_html, to_pandas, to_torch
from .rows import ShardRows, rows_sha256
from .tar_shard import read_tar, write_tar
from .zarr_shard import read_zarr, write_zarr

if TYPE_CHECKING:
    import pandas
    import torch

FORMAT, SHARD_FORMAT, VERSION = "mapet-token-store", "mapet-token-shard", 2
ZARR, WEBDATASET = "zarr", "webdataset"
SUFFIXES = {ZARR: ".zarr.zip", WEBDATASET: ".tar"}
"""The formats of a shard, and how their files' names end."""


def write_shard(
    store: Path | UPath,
    name: str,
    rows: ShardRows,
    attributes: dict[str, Any],
    images: Sequence[ImageRecord] | None = None,
) -> None:
    """Writes one shard and then its entry; the same rows always give the same bytes.

    With `images`, the records of the rows in their order, it is a tar that holds them too; without, a Zarr file.
    """
    storage = ZARR if images is None else WEBDATASET
    views, *grid = rows.tokens.shape[1:]
    final = store / "shards" / f"{name}{SUFFIXES[storage]}"
    about = {
        "name": name,
        "file": f"shards/{final.name}",
        "storage": storage,
        "images": len(rows),
        "grid": grid,
    }
    with written_whole(final) as partial:
        if images is None:
            write_zarr(partial, rows, {"format": SHARD_FORMAT, "version": VERSION, **attributes})
        else:
            write_tar(partial, rows, images, attributes["codebook_fingerprint"])
            about["rows_sha256"] = rows_sha256(read_tar(partial, views, tuple(grid)))
        about |= {"bytes": partial.stat().st_size, "sha256": sha256_file(partial)}
    content = {"format": SHARD_FORMAT, "version": VERSION, **about, **attributes}
    write_sealed_json(entry_path(store, name), content)


def entry_path(store: Path | UPath, name: str) -> Path | UPath:
    """Where the entry of shard `name` lies; it exists exactly when the shard is whole."""
    return store / "shards" / f"{name}.json"


def read_entry(store: Path | UPath, name: str) -> dict[str, Any]:
    """The manifest entry of one whole shard; DataError if it is missing or was changed."""
    entry = read_sealed_json(entry_path(store, name), format=SHARD_FORMAT, version=VERSION)
    return {key: value for key, value in entry.items() if key not in ("format", "version")}


def stored_entries(store: Path | UPath) -> dict[str, dict[str, Any]]:
    """The entries of all shards that are whole, by name, whether a manifest knows them yet or not."""
    with explained(store):
        names = sorted(path.name.removesuffix(".json") for path in (store / "shards").glob("[!.]*.json"))
    return {name: read_entry(store, name) for name in names}


def shard_files(store: Path | UPath) -> set[str]:
    """The files of all shards that lie in a store, whether an entry knows them or not, as far as they are listed."""
    try:
        with explained(store):
            names = [path.name for path in (store / "shards").glob("*")]
    except DataError:  # web servers need not list their folders
        return set()
    return {f"shards/{name}" for name in names if name.endswith(tuple(SUFFIXES.values()))}


def read_shard(store: Path | UPath, entry: dict[str, Any], every_byte: bool = False) -> ShardRows:
    """The rows of the shard that `entry` describes; DataError if its file is missing, cut or changed.

    Without `every_byte` the images of a tar are not read, so that their bytes are not checked; all else always is.
    """
    path = store / entry["file"]
    try:
        if not exists(path):
            raise DataError(f"{path} is missing")
        size = file_size(path)
        if size != entry["bytes"]:
            raise DataError(f"{path} has {size} bytes instead of {entry['bytes']}")
        return _READERS[entry["storage"]](path, entry, every_byte)
    except DataError as error:
        raise DataError(f"{error}; delete it and its .json and give the same encode-shards command again.") from None


def _read_zarr_shard(path: Path | UPath, entry: dict[str, Any], every_byte: bool) -> ShardRows:
    data = read_whole(path)
    _refuse_changed(path, hashlib.sha256(data).hexdigest(), entry["sha256"])
    return read_zarr(data)


def _read_tar_shard(path: Path | UPath, entry: dict[str, Any], every_byte: bool) -> ShardRows:
    with on_this_disk(path) as here:
        if every_byte or is_remote(path):
            _refuse_changed(path, sha256_file(here), entry["sha256"])
        rows = read_tar(here, entry["view"]["views"], tuple(entry["grid"]))
    _refuse_changed(path, rows_sha256(rows), entry["rows_sha256"])
    return rows


_READERS = {ZARR: _read_zarr_shard, WEBDATASET: _read_tar_shard}


def _refuse_changed(path: Path | UPath, digest: str, stated: str) -> None:
    if digest != stated:
        raise DataError(f"{path} was changed since it was written (its digest does not match)")


def write_manifest(store: Path | UPath, description: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Assembles the manifest from the entries of all shards; the last write of an encoding."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "codebook_fingerprint": description["fingerprint"],
        "codebook_sha256": sha256_file(store / "codebook.json"),
        "k": description["k"],
        "grid": description["grid"],
        "storage": entries[0]["storage"],
        "images": sum(entry["images"] for entry in entries),
        "shards": entries,
    }
    write_sealed_json(store / "manifest.json", content)


class TokenStore:
    """A finished token store, opened for reading.

    Raises DataError when opened or read if a file is missing, was changed, or is of another version.
    """

    def __init__(self, path: str | Path | UPath):
        self.path = as_path(path)
        if not is_remote(self.path) and not self.path.is_dir():
            raise DataError(f"{self.path} does not exist or is no folder; give what encode-shards wrote with --out.")
        if not exists(self.path / "manifest.json"):
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
    def storage(self) -> str:
        """The format of its shards: "zarr" or "webdataset"."""
        return next(iter(self.entries.values()))["storage"]

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

    def read_rows(self, name: str, every_byte: bool = False) -> ShardRows:
        """All rows of one shard, after they were checked against the manifest (`read_shard`)."""
        return read_shard(self.path, self.entries[name], every_byte)

    def shards(self) -> Iterator[tuple[str, ShardRows]]:
        """(name, rows) of every shard, one in memory at a time."""
        for name in self.entries:
            yield name, self.read_rows(name)

    @property
    def holds_images(self) -> bool:
        """Whether the images lie in the store, beside their tokens."""
        return self.storage == WEBDATASET

    def tar_of(self, name: str) -> Path | UPath:
        """The tar inside the store that holds the images of one shard; UsageError if they are not in the store."""
        entry = self.entries[name]
        if entry["storage"] != WEBDATASET:
            raise UsageError(
                f"{self.path} holds no images, only their tokens; give --images, or encode with --format webdataset."
            )
        return self.path / entry["file"]

    def tar_size(self, name: str) -> int | None:
        """Bytes of the tar in which the images of one shard lie at its rows' offsets; None if that is no tar."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry["storage"] == WEBDATASET:
            return entry["bytes"]
        return entry["source"]["size"] if entry["source"]["kind"] == "tar" else None

    def __iter__(self) -> Iterator[str]:
        """The keys of all images, shard by shard."""
        for _, rows in self.shards():
            yield from map(str, rows.keys)

    def __getitem__(self, key: str) -> ImageTokens:
        """What is stored of one image; DataError if no image has that key."""
        return ImageTokens.of(*self.find(key))

    def tokens(self, keys: Iterable[str] | None = None) -> Iterator[ImageTokens]:
        """What is stored of the images of `keys`, in their order; of all images, shard by shard, without them.

        All shards are read once at most, and of each only the images asked for are kept. Raises DataError if no image
        has one of the keys.
        """
        if keys is None:
            return (ImageTokens.of(rows, at) for _, rows in self.shards() for at in range(len(rows)))
        asked = [keys] if isinstance(keys, str) else list(keys)
        found = self._images(set(asked))
        for key in asked:
            if key not in found:
                raise DataError(f"{self.path} has no image with key {key!r}.")
        return map(found.__getitem__, asked)

    def _images(self, wanted: set[str]) -> dict[str, ImageTokens]:
        found: dict[str, ImageTokens] = {}
        for name in self.entries:
            if len(found) == len(wanted):
                break
            rows = self._cached_rows(name)
            found |= {key: ImageTokens.of(rows, at) for at, key in enumerate(rows.keys) if key in wanted}
        return found

    def to_numpy(self, keys: Iterable[str] | None = None) -> np.ndarray:
        """Tokens (n, V, H, W) uint16 of the images of `keys`, or of all."""
        empty = np.empty((0, self.views, *self.grid), dtype=np.uint16)
        return np.concatenate([empty, *(image.tokens[None] for image in self.tokens(keys))])

    def to_torch(self, keys: Iterable[str] | None = None) -> "torch.Tensor":
        """The same as int64."""
        return to_torch(self.to_numpy(keys))

    def to_pandas(self, keys: Iterable[str] | None = None) -> "pandas.DataFrame":
        """One line a patch: key, label (-1 for none), view, flip, row, column, token. UsageError without pandas."""
        return to_pandas(list(self.tokens(keys)))

    def _repr_html_(self) -> str:
        facts = [
            ("images", f"{len(self):,}"),
            ("views of an image", f"{self.views} ({self.view['crop']})"),
            ("tokens of a view", f"{self.grid[0]}x{self.grid[1]}, K = {self.k:,}"),
            ("shards", f"{len(self.entries):,} ({self.storage})"),
            ("size", f"{sum(entry['bytes'] for entry in self.entries.values()):,} bytes"),
            ("left out", f"{len(self.skipped()):,} images"),
            ("tower", self.codebook.get("tower")),
            ("codebook", self.fingerprint),
        ]
        return facts_html(f"Token store {self.path}", facts)

    def find(self, key: str) -> tuple[ShardRows, int]:
        """The shard's rows and the row that holds `key`; DataError if no image has it."""
        for name in self.entries:
            rows = self._cached_rows(name)
            at = np.flatnonzero(rows.keys == key)
            if len(at):
                return rows, int(at[0])
        raise DataError(f"{self.path} has no image with key {key!r}.")
