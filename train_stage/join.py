"""The join by key: which tokens belong to which image, and where its bytes lie."""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..shared.console import progress, say
from ..shared.errors import DataError
from ..shared.images import ImageRecord, read_bytes
from ..shared.sources import KeyLedger, SourceShard, open_source
from ..shared.token_rows import NO_LABEL, ShardRows
from ..shared.token_store import TokenStore
from ..shared.world import World
from .columns import ColumnWriter, Place, shared_columns, text_at

_KEYS_AT_ONCE = 1 << 18


@dataclass(frozen=True, eq=False)
class TokenisedImages:
    """n images joined with their rows of a token store. Images are numbered by key, so that a number means the same
    image however the images are spread over tars; rows stand as in the store, shard by shard."""

    tokens: np.ndarray
    """(n, V, H, W) uint16, by row; so are the next eight."""
    crops: np.ndarray
    """(n, V, 4) float64."""
    flips: np.ndarray
    """(n, V) bool."""
    labels: np.ndarray
    """(n,) int64, -1 where an image has none."""
    crc32: np.ndarray
    """(n,) uint32."""
    offsets: np.ndarray
    """(n,) int64: where the image's bytes begin in its file."""
    lengths: np.ndarray
    """(n,) int64: bytes."""
    files: np.ndarray
    """(n,) int64: the file's number."""
    keys: np.ndarray
    """(bytes,) uint8: all keys; `keys_ends` (n,) int64 says where each one ends."""
    keys_ends: np.ndarray
    paths: np.ndarray
    """(bytes,) uint8: the names of all files; `paths_ends` says where each one ends."""
    paths_ends: np.ndarray
    rows: np.ndarray
    """(n,) int64: the row of each image."""
    images: np.ndarray
    """(n,) int64: the image of each row."""
    shard_ends: np.ndarray
    """(shards,) int64: the row after the last one of each shard."""
    keys_sha256: str
    """Which images these are, whatever their order (`images.keys_sha256`)."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def views(self) -> int:
        """How many views of an image are stored."""
        return self.tokens.shape[1]

    def key(self, index: int) -> str:
        return text_at(self.keys, self.keys_ends, self.rows[index])

    def label(self, index: int) -> int | None:
        label = int(self.labels[self.rows[index]])
        return None if label == NO_LABEL else label

    def record(self, index: int) -> ImageRecord:
        """Where the bytes of an image lie."""
        row = self.rows[index]
        path = Path(text_at(self.paths, self.paths_ends, self.files[row]))
        return ImageRecord(self.key(index), path, int(self.offsets[row]), int(self.lengths[row]), self.label(index))

    def read(self, record: ImageRecord, index: int) -> bytes:
        """The bytes of the image `index`, at `record`; DataError unless they are those that were encoded."""
        content = read_bytes(record)
        if zlib.crc32(content) != self.crc32[self.rows[index]]:
            raise DataError(
                f"{record.path}: image {record.key!r} is not the one that was encoded (its CRC32 differs); "
                "restore the source or encode it again."
            )
        return content


def join(
    images: str | Path | Sequence[str | Path] | None,
    store: TokenStore,
    skip_missing: bool = False,
    world: World | None = None,
) -> TokenisedImages:
    """Finds each image's tokens by its key; without `images`, those that the store holds beside its tokens.

    A tar that has the name and the size of the one that a shard was encoded from is that one: where its images lie is
    read from the store, and the CRC32 of each one is checked whenever it is read. Other tars and folders are listed and
    joined key by key. Each node's first process does that; the others of `world` share what it found.

    Images that encode-shards was told to skip are counted and left out. Raises DataError naming others that have no
    tokens, unless `skip_missing`; then they are counted and left out, too.
    Tokens whose image is not in `images` are not an error (training on some of the shards), but they are counted.
    """

    def build(file: BinaryIO) -> tuple[dict[str, Place], str]:
        return _Join(store, skip_missing, ColumnWriter(file)).run(images)

    columns, digest = shared_columns(build, world or World())
    return TokenisedImages(**columns, keys_sha256=digest)


class _Join:
    """The join as it happens in a node's first process: rows shard by shard into a file, keys in memory."""

    def __init__(self, store: TokenStore, skip_missing: bool, writer: ColumnWriter):
        self.store, self.skip_missing, self.writer = store, skip_missing, writer
        self.count = 0
        self.keys: list[bytes] = []
        self.key_lengths: list[np.ndarray] = []
        self.shard_ends: list[int] = []
        self.paths: dict[str, int] = {}

    def run(self, images: str | Path | Sequence[str | Path] | None) -> tuple[dict[str, Place], str]:
        tars, others = self._sources(images)
        records = self._records(others)
        left = dict(records)
        names = list(self.store.entries) if records else [name for name in self.store.entries if name in tars]
        self._reserve(sum(self.store.entries[name]["images"] for name in names))
        with progress("reading tokens", len(names), "shards") as advance:
            for name in names:
                rows = self.store.read_rows(name)
                if name in tars:
                    _refuse_in_both(rows, records, tars[name])
                    self._take_all(rows, tars[name])
                else:
                    self._take_some(rows, records, left)
                advance()
        self._account(left, self.count + len(left))
        return self._finish()

    def _sources(self, images: str | Path | Sequence[str | Path] | None) -> tuple[dict[str, str], list[SourceShard]]:
        """The tars that the store's own offsets are right for, by shard, and all other sources."""
        if images is None:
            return {name: str(self.store.tar_of(name)) for name in self.store.entries}, []
        shards = open_source(images)
        known = [shard for shard in shards if shard.is_tar and shard.size() == self.store.tar_size(shard.name)]
        return {shard.name: str(shard.root) for shard in known}, [shard for shard in shards if shard not in known]

    def _records(self, shards: list[SourceShard]) -> dict[str, ImageRecord]:
        """The images of sources that must be listed, by key; DataError for a key that stands twice."""
        lenient = bool(self.store.skipped())
        ledger = KeyLedger()
        found = {shard.name: shard.index([] if lenient else None) for shard in shards}
        for name, records in found.items():
            ledger.add(name, (record.key for record in records))
        ledger.refuse_doubles(lambda name: [record.key for record in found[name]])
        return {record.key: record for records in found.values() for record in records}

    def _reserve(self, most: int) -> None:
        views, (height, width) = self.store.views, self.store.grid
        for name, dtype, *shape in (
            ("tokens", "<u2", views, height, width),
            ("crops", "<f8", views, 4),
            ("flips", "|b1", views),
            ("labels", "<i8"),
            ("crc32", "<u4"),
            ("offsets", "<i8"),
            ("lengths", "<i8"),
            ("files", "<i8"),
        ):
            self.writer.reserve(name, dtype, most, *shape)

    def _take_all(self, rows: ShardRows, path: str) -> None:
        file = self._file(path)
        self._append(rows, slice(None), rows.offsets, rows.lengths, rows.labels, np.full(len(rows), file))

    def _take_some(self, rows: ShardRows, records: dict[str, ImageRecord], left: dict[str, ImageRecord]) -> None:
        """Takes the rows whose key is among `records`, and takes those keys from what is `left`."""
        places = [place for place, key in enumerate(rows.keys) if key in records]
        for place in places:
            if left.pop(rows.keys[place], None) is None:
                raise DataError(f"{self.store.path} holds {rows.keys[place]!r} twice; encode each image once.")
        some = [records[rows.keys[place]] for place in places]
        labels = [NO_LABEL if record.label is None else record.label for record in some]
        self._append(
            rows,
            places,
            [record.offset for record in some],
            [record.length for record in some],
            labels,
            [self._file(str(record.path)) for record in some],
        )

    def _file(self, path: str) -> int:
        return self.paths.setdefault(path, len(self.paths))

    def _append(self, rows: ShardRows, places, offsets, lengths, labels, files) -> None:
        own = {name: getattr(rows, name)[places] for name in ("tokens", "crops", "flips", "crc32")}
        given = {"offsets": offsets, "lengths": lengths, "labels": labels, "files": files}
        for name, values in {**own, **given}.items():
            self.writer.write(name, self.count, np.asarray(values))
        keys = [key.encode() for key in rows.keys[places]]
        self.keys.append(b"".join(keys))
        self.key_lengths.append(np.array([len(key) for key in keys], dtype=np.int64))
        self.count += len(keys)
        if keys:
            self.shard_ends.append(self.count)

    def _account(self, left: dict[str, ImageRecord], given: int) -> None:
        """Says what of images and tokens is not used; DataError for images without tokens, unless they may be."""
        path = self.store.path
        skipped = {key for _, key, _ in self.store.skipped()}
        if skipped:
            say(f"{len(self.store.skipped())} images were skipped when {path} was encoded; they are left out.")
        given -= sum(key in skipped for key in left)
        missing = [key for key in left if key not in skipped]
        if missing:
            named = f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
            text = f"{len(missing)} of {given} images have no tokens in {path}: {named}"
            if not self.skip_missing or len(missing) == given:
                raise DataError(f"{text}; encode them (mapet tokenize encode-shards) or --set data.skip_missing=true.")
            say(f"{text}; they are left out.")
        if self.count < len(self.store):
            unused = len(self.store) - self.count
            say(f"{unused} rows of {path} belong to images that were not given; they are not used.")

    def _finish(self) -> tuple[dict[str, Place], str]:
        lengths = np.concatenate([np.empty(0, dtype=np.int64), *self.key_lengths])
        keys = _padded(self.keys, lengths, self.key_lengths)
        rows = np.argsort(keys, kind="stable")
        doubled = sum(int((some[1:] == some[:-1]).sum()) for some in _sorted_parts(keys, rows, overlap=1))
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
        paths = [path.encode() for path in self.paths]
        writer.add_strings("paths", [b"".join(paths)], np.array([len(path) for path in paths], dtype=np.int64))
        return writer.finish(self.count, *fixed), _digest(keys, rows)


def _refuse_in_both(rows: ShardRows, records: dict[str, ImageRecord], tar: str) -> None:
    common = [key for key in rows.keys if key in records] if records else []
    if common:
        raise DataError(f"key {min(common)!r} is in both {records[min(common)].path} and {tar}; keys must be unique.")


def _padded(blocks: list[bytes], lengths: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """All keys as one array of equally long byte strings, whose order is that of the texts: UTF-8 keeps it."""
    keys = np.empty(len(lengths), dtype=f"S{max(lengths.max(initial=1), 1)}")
    start = 0
    for block, part in zip(blocks, parts, strict=True):
        ends = np.cumsum(part)
        keys[start : start + len(part)] = [
            block[end - length : end] for end, length in zip(ends.tolist(), part.tolist(), strict=True)
        ]
        start += len(part)
    return keys


def _sorted_parts(keys: np.ndarray, rows: np.ndarray, overlap: int = 0):
    """Yields the keys in order, many at a time, each time beginning with the last `overlap` ones of the time before."""
    for start in range(0, len(rows), _KEYS_AT_ONCE):
        yield keys[rows[max(start - overlap, 0) : start + _KEYS_AT_ONCE]]


def _digest(keys: np.ndarray, rows: np.ndarray) -> str:
    """`images.keys_sha256` of all keys, without a list of them."""
    digest, between = hashlib.sha256(), b""
    for some in _sorted_parts(keys, rows):
        digest.update(between + b"\n".join(some.tolist()))
        between = b"\n"
    return digest.hexdigest()
