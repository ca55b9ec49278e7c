"""The token store: the tokens and views of every image in one file per source shard, beside a manifest.

TOKENS/manifest.json         what is in the store, with a digest of every file; written last
TOKENS/codebook.json         the description of the tokenizer that made the tokens (its weights and centroids are not
                             in the store)
TOKENS/shards/NAME.json      one shard's entry of the manifest, written when the shard is complete
TOKENS/shards/NAME.zarr.zip  the rows of a shard (`zarr_shard`), or
TOKENS/shards/NAME.tar       the rows with their images (`tar_shard`)

TOKENS is a local folder or a URL. Code outside this room reads and writes stores through this module.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from upath import UPath

from ..artifacts.codes import UINT16, Dtype, Tokens, token_dtype
from ..artifacts.fields import checked
from ..artifacts.schemas import Manifest
from ..errors import DataError, FingerprintMismatch, UsageError
from ..sources.keys import KeyIndex
from ..sources.options import SourceOptions
from ..storage.files import read_sealed_json, sha256_file, write_sealed_json
from ..storage.remote import as_path, exists, is_remote
from .codebook import read_description
from .notebook import ImageTokens, facts_html, to_pandas, to_torch
from .rows import ShardRows, Strings
from .shard_files import (
    SHARD_FORMAT,
    SUFFIXES,
    VERSION,
    WEBDATASET,
    ZARR,
    entry_path,
    read_entry,
    read_shard,
    read_shard_keys,
    refuse_other_file,
    shard_files,
    stored_entries,
    write_shard,
)

if TYPE_CHECKING:
    import pandas
    import torch

FORMAT = "mapet-token-store"
_CACHED_SHARDS = 4

__all__ = [
    "FORMAT",
    "SHARD_FORMAT",
    "SUFFIXES",
    "VERSION",
    "WEBDATASET",
    "ZARR",
    "TokenStore",
    "entry_path",
    "read_entry",
    "refuse_mixture",
    "shard_files",
    "stored_entries",
    "write_manifest",
    "write_shard",
]


def write_manifest(store: Path | UPath, description: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Assembles the manifest from the entries of all shards; the last write of an encoding.

    `description` is the tokenizer's, as in the store's `codebook.json`; of it the manifest repeats `fingerprint`, `k`
    and `grid`. Raises DataError if an entry does not fit the others.
    """
    refuse_mixture(store, description["fingerprint"], entries[0]["storage"], entries)
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
    if token_dtype(content["k"]) != UINT16:
        content["dtype"] = token_dtype(content["k"])
    write_sealed_json(store / "manifest.json", content)


def refuse_mixture(store: Path | UPath, fingerprint: str, storage: str, entries: Iterable[dict[str, Any]]) -> None:
    """Raises FingerprintMismatch or DataError for a shard made with another codebook, other views or another format.

    `fingerprint` and `storage` are those of the manifest; the views of the first shard are those of the store, as the
    manifest does not state any.
    """
    view = None
    for entry in entries:
        name, made_with = entry["name"], entry["codebook_fingerprint"]
        if made_with != fingerprint:
            raise FingerprintMismatch(
                f"{store} is mixed: shard {name} was made with codebook {made_with[:12]} and the store with "
                f"{fingerprint[:12]}; delete shards/{name}.json and give the encode-shards command of the store again."
            )
        if entry["storage"] != storage:
            raise DataError(
                f"{store} is mixed: shard {name} has format {entry['storage']} and the store {storage}; delete "
                f"shards/{name}.json and give the encode-shards command of the store again."
            )
        view = view or entry["view"]
        if entry["view"] != view:
            raise DataError(
                f"{store} is mixed: shard {name} has other views ({entry['view']}) than the first one ({view}); delete "
                f"shards/{name}.json and give the encode-shards command of the store again."
            )


def _refuse_inconsistent(store: Path | UPath, manifest: Manifest, tokenizer: dict[str, Any]) -> None:
    """Raises DataError unless manifest, codebook.json and shards agree in everything that they state."""
    path, names = store / "manifest.json", set[str]()
    stated = (manifest.codebook_fingerprint, manifest.k, list(manifest.grid))
    if stated != (tokenizer["fingerprint"], tokenizer["k"], tokenizer["grid"]):
        raise DataError(
            f"{path} is of the codebook {manifest.codebook_fingerprint[:12]} (K = {manifest.k}, grid "
            f"{list(manifest.grid)}), and codebook.json beside it is {tokenizer['fingerprint'][:12]} (K = "
            f"{tokenizer['k']}, grid {tokenizer['grid']}); restore the two files that belong together."
        )
    for entry in manifest.shards:
        refuse_other_file(entry, path)
        if entry.grid != manifest.grid:
            raise DataError(
                f"{path}: shard {entry.name!r} has another grid than the rest of the store; encode its images again "
                "into a store of their own."
            )
        if entry.dtype != manifest.dtype:
            raise DataError(
                f"{path}: the tokens of shard {entry.name!r} are {entry.dtype}, and those of K = {manifest.k} are "
                f"{manifest.dtype}; encode its images again into a store of their own."
            )
        if entry.name in names:
            raise DataError(f"{path} lists shard {entry.name!r} twice; restore it or make it again.")
        names.add(entry.name)
    images = sum(entry.images for entry in manifest.shards)
    if images != manifest.images:
        raise DataError(f"{path} states {manifest.images} images and its shards {images}; restore it or make it again.")


class TokenStore:
    """A finished token store, opened for reading.

    `store[key]` is the `ImageTokens` of one image, `key in store` says whether it has tokens, and iteration gives all
    keys. The first lookup of a key reads the keys of every shard into an index of 16 bytes per image; after that a
    lookup reads at most one shard. The last four shards that were looked into stay in memory.

    Raises DataError, when opened or read, if a file is missing, was changed, or has another version.
    """

    def __init__(self, path: str | Path | UPath):
        self.path = as_path(path)
        if not is_remote(self.path) and not self.path.is_dir():
            raise DataError(f"{self.path} does not exist or is not a folder; give what encode-shards wrote with --out.")
        if not exists(self.path / "manifest.json"):
            if exists(self.path / "codebook.json") and not exists(self.path / "centroids.safetensors"):
                whole = len(stored_entries(self.path))
                raise DataError(
                    f"{self.path} has no manifest.json (finished shards: {whole}): its encoding did not finish; give "
                    "the same encode-shards command again."
                )
            raise DataError(
                f"{self.path} has no manifest.json: it is not a token store, or its encoding did not finish; "
                "give the same encode-shards command again."
            )
        self.manifest = read_sealed_json(self.path / "manifest.json", format=FORMAT, version=VERSION)
        manifest = checked(self.manifest, Manifest, self.path / "manifest.json")
        self.codebook: dict[str, Any] = read_description(self.path / "codebook.json")
        """The same as `tokenizer`, under its name in earlier versions."""
        self.entries: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in self.manifest["shards"]}
        """The manifest's entry of each shard, by the shard's name."""
        refuse_mixture(self.path, self.fingerprint, manifest.storage, self.entries.values())
        _refuse_inconsistent(self.path, manifest, self.codebook)
        self._index: KeyIndex | None = None
        self._cached: dict[str, ShardRows] = {}

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The description of the tokenizer that made the tokens, as embedded in the store."""
        return self.codebook

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the tokenizer that made the tokens."""
        return str(self.manifest["codebook_fingerprint"])

    @property
    def k(self) -> int:
        """How many different tokens the tokenizer has."""
        return int(self.manifest["k"])

    @property
    def dtype(self) -> Dtype:
        """The type of its tokens: "uint16", or "uint32" where K is more than 65,536."""
        return token_dtype(self.k)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of one view's tokens."""
        height, width = self.manifest["grid"]
        return height, width

    def __len__(self) -> int:
        return int(self.manifest["images"])

    def __repr__(self) -> str:
        shards, (rows, columns) = len(self.entries), self.grid
        return f"TokenStore({str(self.path)!r}: {len(self)} images, {shards} shards, K={self.k}, {rows}x{columns})"

    @property
    def storage(self) -> str:
        """The storage format of its shards: "zarr" or "webdataset"."""
        return str(self._any_entry["storage"])

    @property
    def view(self) -> dict[str, Any]:
        """The policy by which its views were drawn (`shared.images.views.ViewPolicy.to_json`)."""
        view: dict[str, Any] = self._any_entry["view"]
        return view

    @property
    def views(self) -> int:
        """Views per image."""
        return int(self.view["views"])

    @property
    def _any_entry(self) -> dict[str, Any]:
        return next(iter(self.entries.values()))

    @cached_property
    def source_options(self) -> SourceOptions:
        """How the images of its shards were read: where keys end, and which picture of a key is its image."""
        return SourceOptions.of_store(entry["source"] for entry in self.entries.values())

    def skipped(self) -> list[tuple[str, str, str]]:
        """(shard, key, reason) of everything that was left out with --on-error skip."""
        return [(name, key, reason) for name, entry in self.entries.items() for key, reason in entry.get("skipped", ())]

    def unlabelled(self) -> list[tuple[str, str, str]]:
        """(shard, key, reason) of every image whose label could not be read; its tokens are in the store."""
        return [
            (name, key, reason) for name, entry in self.entries.items() for key, reason in entry.get("unlabelled", ())
        ]

    def read_rows(self, name: str, every_byte: bool = False) -> ShardRows:
        """All rows of one shard, checked against the manifest (`shard_files.read_shard`).

        Raises DataError also for a token that is not below K, and names its image.
        """
        rows = read_shard(self.path, self.entries[name], every_byte)
        if rows.tokens.size and int(rows.tokens.max()) >= self.k:
            row = int(np.flatnonzero((rows.tokens >= self.k).reshape(len(rows), -1).any(axis=1))[0])
            raise DataError(
                f"{self.path}: image {rows.keys[row]!r} in {name} has token {int(rows.tokens[row].max())}, and K is "
                f"{self.k}; delete {self.entries[name]['file']} and its .json and give the same encode-shards command "
                "again."
            )
        return rows

    def read_keys(self, name: str) -> Strings:
        """The keys (n,) of one shard, checked as `read_rows` checks its rows; other columns are not decoded."""
        return read_shard_keys(self.path, self.entries[name])

    def shards(self) -> Iterator[tuple[str, ShardRows]]:
        """(name, rows) of every shard, one in memory at a time."""
        for name in self.entries:
            yield name, self.read_rows(name)

    @property
    def holds_images(self) -> bool:
        """Whether the store contains the images as well as their tokens."""
        return self.storage == WEBDATASET

    def tar_of(self, name: str) -> Path | UPath:
        """The tar in the store that contains the images of one shard; UsageError if the store has no images."""
        entry = self.entries[name]
        if entry["storage"] != WEBDATASET:
            raise UsageError(
                f"{self.path} holds no images, only their tokens; give --images, or encode with --format webdataset."
            )
        path: Path | UPath = self.path / entry["file"]
        return path

    def tar_size(self, name: str) -> int | None:
        """Bytes of the tar in which a shard's images are found at its rows' offsets; None if they are in a folder."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        if entry["storage"] == WEBDATASET:
            return int(entry["bytes"])
        return entry["source"]["size"] if entry["source"]["kind"] == "tar" else None

    def __iter__(self) -> Iterator[str]:
        """The keys of all images, shard by shard."""
        for _, rows in self.shards():
            yield from map(str, rows.keys)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key) is not None

    def __getitem__(self, key: str) -> ImageTokens:
        """The tokens of one image; DataError if no image has that key."""
        return ImageTokens.of(*self.find(key))

    def find(self, key: str) -> tuple[ShardRows, int]:
        """The rows of the shard that has `key`, and the number of its row; DataError if no image has it."""
        place = self._find(key)
        if place is None:
            raise self._unknown(key)
        return place

    def _find(self, key: str) -> tuple[ShardRows, int] | None:
        if self._index is None:
            self._index = KeyIndex(map(self.read_keys, self.entries))
        names = list(self.entries)
        for shard, row in self._index.candidates(key):
            rows = self._rows_of(names[shard])
            if rows.keys[row] == key:  # another key may have the same digest
                return rows, row
        return None

    def _unknown(self, key: str) -> DataError:
        return DataError(f"{self.path} has no image with key {key!r}.")

    def _rows_of(self, name: str) -> ShardRows:
        """`read_rows`, for the last few shards from memory."""
        rows = self._cached.pop(name) if name in self._cached else self.read_rows(name)
        self._cached[name] = rows  # last, as the most recently used
        if len(self._cached) > _CACHED_SHARDS:
            del self._cached[next(iter(self._cached))]
        return rows

    def tokens(self, keys: Iterable[str] | None = None) -> Iterator[ImageTokens]:
        """The tokens of the images with these keys, in the order of the keys; without keys, of all images.

        Every shard is read at most once, and only the requested images stay in memory. Raises DataError if no image
        has one of the keys.
        """
        if keys is None:
            return (ImageTokens.of(rows, row) for _, rows in self.shards() for row in range(len(rows)))
        requested = [keys] if isinstance(keys, str) else list(keys)
        images = self._images(set(requested))
        for key in requested:
            if key not in images:
                raise self._unknown(key)
        return map(images.__getitem__, requested)

    def _images(self, requested: set[str]) -> dict[str, ImageTokens]:
        images: dict[str, ImageTokens] = {}
        for name in self.entries:
            if len(images) == len(requested):
                break
            rows = self._rows_of(name)
            images |= {key: ImageTokens.of(rows, row) for row, key in enumerate(rows.keys) if key in requested}
        return images

    def to_numpy(self, keys: Iterable[str] | None = None) -> Tokens:
        """Tokens (n, V, H, W), of the store's `dtype`, of the images with these keys, or of all."""
        empty = np.empty((0, self.views, *self.grid), dtype=self.dtype)
        return np.concatenate([empty, *(image.tokens[None] for image in self.tokens(keys))])

    def to_torch(self, keys: Iterable[str] | None = None) -> "torch.Tensor":
        """Tokens (n, V, H, W) int64 of the images with these keys, or of all."""
        return to_torch(self.to_numpy(keys))

    def to_pandas(self, keys: Iterable[str] | None = None) -> "pandas.DataFrame":
        """One row per patch: key, label, view, flip, row, column, token. UsageError without pandas.

        Labels are int64, -1 for none; if any is a class name, they are objects, None for none.
        """
        return to_pandas(list(self.tokens(keys)))

    def _repr_html_(self) -> str:
        facts: list[tuple[str, object]] = [
            ("images", f"{len(self):,}"),
            ("views per image", f"{self.views} ({self.view['crop']})"),
            ("tokens per view", f"{self.grid[0]}x{self.grid[1]}, K = {self.k:,}"),
            ("shards", f"{len(self.entries):,} ({self.storage})"),
            ("size", f"{sum(entry['bytes'] for entry in self.entries.values()):,} bytes"),
            ("left out", f"{len(self.skipped()):,} images"),
            ("tower", self.tokenizer.get("tower")),
            ("codebook", self.fingerprint),
        ]
        return facts_html(f"Token store {self.path}", facts)
