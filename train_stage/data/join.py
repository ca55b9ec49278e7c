"""The join by key: the tokens of each image, and where its bytes lie."""

import hashlib
import json
import mmap
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...shared.errors import DataError, UsageError
from ...shared.labels.columns import NO_LABEL, from_column
from ...shared.labels.parsing import Label
from ...shared.runtime.console import progress, say
from ...shared.runtime.distributed import World
from ...shared.sources.sources import SourceShard, open_source
from ...shared.storage.compressed import is_compressed
from ...shared.storage.remote import is_url, without_query
from ...shared.tokens.rows import ShardRows
from ...shared.tokens.store import TokenStore
from .dataset import TokenisedImages
from .listing import NOT_LISTED, ListedImages
from .shared_columns import ColumnWriter, Place, shared_columns

TARS_PREFIX = "mapet-tars-"
_KEYS_AT_ONCE = 1 << 18
_BYTES_OF_OBJECT = 41
"""What Python adds to a string of bytes in an array of objects."""
Keys = NDArray[np.bytes_] | NDArray[np.object_]


def join(
    images: str | Path | Sequence[str | Path] | None,
    store: TokenStore,
    skip_missing: bool = False,
    world: World | None = None,
    *,
    shuffle: str = "full",
    cache: str | Path | None = None,
) -> TokenisedImages:
    """Joins images with their tokens by key; without `images`, those that the store holds beside its tokens.

    A tar with the name and size of the one that a shard was encoded from is taken to be that one: the store's offsets
    locate its images, and the CRC32 of each image is checked whenever it is read. Other tars and folders are listed
    and joined key by key. The first process of each node does this; the others of `world` share the result.

    Remote tars must have the names that they were encoded under, and an order by shards (`shuffle` = "shards"); they
    are fetched to the folder `cache`, or to a temporary one. A remote store that holds its images is read once for
    its rows.

    Images that encode-shards skipped are counted and left out. Tokens whose image is not in `images` are counted but
    are not an error: a run may train on some of the shards.

    Raises:
        DataError naming images without tokens, unless `skip_missing`, which counts them and leaves them out; UsageError
        for remote images without `shuffle` = "shards".
    """

    def build(file: BinaryIO) -> tuple[dict[str, Place], tuple[str, Path | None]]:
        joining = _Join(store, skip_missing, shuffle, ColumnWriter(file))
        places, digest = joining.run(images)
        folder = Path(cache) if cache else Path(tempfile.gettempdir(), f"{TARS_PREFIX}{uuid.uuid4().hex[:12]}")
        return places, (digest, folder if any(map(is_url, joining.paths)) else None)

    columns, (digest, folder) = shared_columns(build, world or World())
    # An anonymous mapping is shared with the loader's workers.
    plain = np.frombuffer(mmap.mmap(-1, max(len(columns["rows"]), 1)), dtype=np.uint8)
    return TokenisedImages(
        **columns, keys_sha256=digest, plain=plain, max_pixels=store.source_options.max_pixels, folder=folder
    )


class _Join:
    """The join in the first process of a node: rows go to a file shard by shard, keys stay in memory."""

    def __init__(self, store: TokenStore, skip_missing: bool, shuffle: str, writer: ColumnWriter) -> None:
        self.store, self.skip_missing, self.shuffle, self.writer = store, skip_missing, shuffle, writer
        self.count = 0
        self.keys: list[bytes] = []
        self.key_lengths: list[NDArray[np.int64]] = []
        self.shard_ends: list[int] = []
        self.paths: dict[str, int] = {}
        self.sizes: list[int] = []
        self.classes: dict[Label, int] = {}

    def run(self, images: str | Path | Sequence[str | Path] | None) -> tuple[dict[str, Place], str]:
        tars, others = self._sources(images)
        listed = ListedImages(others, lenient=bool(self.store.skipped()))
        joined = np.zeros(len(listed), dtype=bool)
        names = list(self.store.entries) if len(listed) else [name for name in self.store.entries if name in tars]
        self._reserve(sum(self.store.entries[name]["images"] for name in names))
        with progress("reading tokens", len(names), "shards") as advance:
            for name in names:
                rows = self.store.read_rows(name)
                if name in tars:
                    _refuse_in_both(rows, listed, tars[name])
                    self._append_all(name, rows, tars[name])
                else:
                    self._append_matching(rows, listed, joined)
                advance()
        self._account(listed, np.flatnonzero(~joined))
        return self._finish()

    def _sources(self, images: str | Path | Sequence[str | Path] | None) -> tuple[dict[str, str], list[SourceShard]]:
        """The tars whose images the store's offsets locate, by shard name, and all other sources."""
        if images is None:
            tars = {name: str(self.store.tar_of(name)) for name in self.store.entries}
            self._refuse_full_shuffle(tars.values())
            return tars, []
        shards = open_source(images, self.store.source_options)
        self._refuse_full_shuffle(str(shard.root) for shard in shards)
        known = {shard.name: str(shard.root) for shard in shards if self._is_known(shard)}
        return known, [shard for shard in shards if shard.name not in known]

    def _refuse_full_shuffle(self, sources: Iterable[str]) -> None:
        remote = next(filter(is_url, sources), None)
        if remote and self.shuffle != "shards":
            raise UsageError(
                f"{without_query(remote)} is remote, and data.shuffle={self.shuffle} reads images in any order; --set "
                "data.shuffle=shards, or copy the images here."
            )

    def _is_known(self, shard: SourceShard) -> bool:
        """Whether the offsets of the store's shard of this name belong to this tar."""
        if not shard.is_remote:
            return shard.kind == "tar" and shard.size() == self.store.tar_size(shard.name)
        if is_compressed(without_query(str(shard.root))):
            raise DataError(
                f"{shard.title} is compressed, and its images are read in any order; unpack it there or here."
            )
        if not self.store.holds_images and self.store.tar_size(shard.name):  # its size is compared when it is fetched
            return True
        raise DataError(
            f"{shard.title} has no tokens under its name in {self.store.path}; give remote tars that were encoded "
            "under that name, or copy them here."
        )

    def _reserve(self, most: int) -> None:
        views, (height, width) = self.store.views, self.store.grid
        for name, dtype, *shape in (
            ("tokens", np.dtype(self.store.dtype).str, views, height, width),
            ("crops", "<f8", views, 4),
            ("flips", "|b1", views),
            ("labels", "<i8"),
            ("crc32", "<u4"),
            ("offsets", "<i8"),
            ("lengths", "<i8"),
            ("files", "<i8"),
        ):
            self.writer.reserve(name, dtype, most, *shape)

    def _append_all(self, name: str, rows: ShardRows, path: str) -> None:
        file = self._file(path, self.store.tar_size(name))
        # Labels are looked up once per class and not once per image.
        values, places = np.unique(rows.labels, return_inverse=True)
        numbers = self._numbered(from_column(value, rows.classes) for value in values)
        labels = np.array(numbers, dtype=np.int64)[places]
        self._append(rows, slice(None), rows.offsets, rows.lengths, labels, np.full(len(rows), file))

    def _numbered(self, labels: Iterable[Label | None]) -> list[int]:
        """Labels by the order in which they first occurred; shards may number their class names differently."""
        classes = self.classes
        return [NO_LABEL if label is None else classes.setdefault(label, len(classes)) for label in labels]

    def _append_matching(self, rows: ShardRows, listed: ListedImages, joined: NDArray[np.bool_]) -> None:
        """Appends the rows whose key is listed, and marks those images as joined."""
        found = listed.find(rows.keys)
        places = np.flatnonzero(found != NOT_LISTED)
        numbers = found[places]
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            if joined[number]:
                raise DataError(f"{self.store.path} holds {rows.keys[place]!r} twice; encode each image once.")
            joined[number] = True
        columns = listed.columns
        labels = self._numbered(map(listed.label, numbers.tolist()))
        files = [self._file(listed.path(number)) for number in numbers.tolist()]
        self._append(rows, places, columns.offsets[numbers], columns.lengths[numbers], labels, files)

    def _file(self, path: str, size: int | None = 0) -> int:
        if path not in self.paths:
            self.paths[path] = len(self.paths)
            self.sizes.append(size or 0)
        return self.paths[path]

    def _append(
        self,
        rows: ShardRows,
        places: slice | NDArray[np.int64],
        offsets: ArrayLike,
        lengths: ArrayLike,
        labels: ArrayLike,
        files: ArrayLike,
    ) -> None:
        stored = {name: getattr(rows, name)[places] for name in ("tokens", "crops", "flips", "crc32")}
        located = {"offsets": offsets, "lengths": lengths, "labels": labels, "files": files}
        for name, values in {**stored, **located}.items():
            self.writer.write(name, self.count, np.asarray(values))
        keys = [key.encode() for key in rows.keys[places]]
        self.keys.append(b"".join(keys))
        self.key_lengths.append(np.array([len(key) for key in keys], dtype=np.int64))
        self.count += len(keys)
        if keys:
            self.shard_ends.append(self.count)

    def _account(self, listed: ListedImages, unmatched: NDArray[np.int64]) -> None:
        """Logs unused images and tokens. Raises DataError for images without tokens, unless they may be skipped."""
        path = self.store.path
        skipped = {key for _, key, _ in self.store.skipped()}
        if skipped:
            say(f"{len(self.store.skipped())} images were skipped when {path} was encoded; they are left out.")
            unmatched = unmatched[[listed.key(number) not in skipped for number in unmatched.tolist()]]
        missing, total = len(unmatched), self.count + len(unmatched)
        if missing:
            named = ", ".join(map(listed.key, unmatched[:3].tolist())) + (" ..." if missing > 3 else "")
            text = f"{missing} of {total} images have no tokens in {path}: {named}"
            if not self.skip_missing or missing == total:
                raise DataError(f"{text}; encode them (mapet tokenize encode-shards) or --set data.skip_missing=true.")
            say(f"{text}; they are left out.")
        if self.count < len(self.store):
            unused = len(self.store) - self.count
            say(f"{unused} rows of {path} belong to images that were not given; they are not used.")

    def _finish(self) -> tuple[dict[str, Place], str]:
        lengths = np.concatenate([np.empty(0, dtype=np.int64), *self.key_lengths])
        keys = _padded(self.keys, lengths, self.key_lengths)
        rows = np.argsort(keys, kind="stable")
        doubled = sum(int((part[1:] == part[:-1]).sum()) for part in _sorted_parts(keys, rows, overlap=1))
        if doubled:
            raise DataError(f"{self.store.path} holds {doubled} keys twice; encode each image once.")
        images = np.empty_like(rows)
        images[rows] = np.arange(len(rows))
        writer = self.writer
        fixed = tuple(writer.places)
        writer.add("rows", rows)
        writer.add("images", images)
        writer.add("shard_ends", np.array(self.shard_ends, dtype=np.int64))
        writer.add_strings("keys", self.keys, lengths)
        paths = [path.encode("utf-8", "surrogateescape") for path in self.paths]
        classes = [json.dumps(label, ensure_ascii=False).encode() for label in self.classes]
        writer.add_strings("classes", [b"".join(classes)], np.array([len(label) for label in classes], dtype=np.int64))
        writer.add("sizes", np.array(self.sizes, dtype=np.int64))
        writer.add_strings("paths", [b"".join(paths)], np.array([len(path) for path in paths], dtype=np.int64))
        return writer.finish(self.count, *fixed), _digest(keys, rows)


def _refuse_in_both(rows: ShardRows, listed: ListedImages, tar: str) -> None:
    found = listed.find(rows.keys)
    common = [(rows.keys[place], int(found[place])) for place in np.flatnonzero(found != NOT_LISTED)]
    if common:
        key, number = min(common)
        raise DataError(f"key {key!r} is in both {listed.path(number)} and {tar}; keys must be unique.")


def _padded(blocks: list[bytes], lengths: NDArray[np.int64], parts: list[NDArray[np.int64]]) -> Keys:
    """All keys as one array of byte strings, of equal length unless a few keys are much longer than the others.

    UTF-8 sorts as the texts do.
    """
    longest = max(int(lengths.max(initial=1)), 1)
    padded = longest * len(lengths) <= int(lengths.sum()) + _BYTES_OF_OBJECT * len(lengths)
    keys: Keys = np.empty(len(lengths), dtype=f"S{longest}" if padded else object)
    start = 0
    for block, part in zip(blocks, parts, strict=True):
        ends = np.cumsum(part)
        keys[start : start + len(part)] = [
            block[end - length : end] for end, length in zip(ends.tolist(), part.tolist(), strict=True)
        ]
        start += len(part)
    return keys


def _sorted_parts(keys: Keys, rows: NDArray[np.int64], overlap: int = 0) -> Iterator[Keys]:
    """Yields the sorted keys in blocks; each block begins with the last `overlap` keys of the block before."""
    for start in range(0, len(rows), _KEYS_AT_ONCE):
        yield keys[rows[max(start - overlap, 0) : start + _KEYS_AT_ONCE]]


def _digest(keys: Keys, rows: NDArray[np.int64]) -> str:
    """`records.keys_sha256` of all keys, without a list of them."""
    digest, between = hashlib.sha256(), b""
    for part in _sorted_parts(keys, rows):
        digest.update(between + b"\n".join(part.tolist()))
        between = b"\n"
    return digest.hexdigest()
