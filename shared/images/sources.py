"""Where images come from: WebDataset tars (local or remote) or a folder of (class) folders, as shards of records.

Nothing is read until a shard is staged (a remote tar is then downloaded) and indexed (its headers are read).
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from ..errors import DataError, UsageError
from ..storage.files import sha256_file
from ..storage.remote import as_path, download, is_url, list_tars, remote_size
from .folders import list_folder
from .keys import Skipped
from .records import ImageRecord
from .tars import index_tar


@dataclass(frozen=True)
class SourceShard:
    """A unit of work: one tar, or up to 1,000 images of a folder.

    `root` is the tar (a path or a URL) or the folder; `listed` are a folder's images, or (key, reason) where one
    cannot be used.
    """

    name: str
    root: Path | str
    listed: tuple[ImageRecord | tuple[str, str], ...] | None = None
    url: str | None = None
    """Where the file at `root` was downloaded from, while it is staged."""

    @property
    def is_tar(self) -> bool:
        return self.listed is None

    @property
    def is_remote(self) -> bool:
        return isinstance(self.root, str)

    @contextmanager
    def staged(self) -> Iterator["SourceShard"]:
        """The shard with local files; a remote tar is on this disk for the time of the block."""
        if not self.is_remote:
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
            path = Path(folder, f"{self.name}.tar")
            download(self.root, path)
            here = replace(self, root=path, url=self.root)
            try:
                yield here
            except DataError as error:
                raise here.named(error) from None

    def named(self, error: DataError) -> DataError:
        """`error` with the shard's URL in it instead of the place where it is staged."""
        return error if self.url is None else type(error)(str(error).replace(str(self.root), self.url))

    def index(self, skipped: Skipped | None = None) -> list[ImageRecord]:
        """The shard's images in order, from headers alone.

        What cannot be used (a cut or damaged part, a key that stands twice, a label that is no number, a name that
        cannot be a key) is added to `skipped`; without such a list it raises a DataError that names it.
        """
        if self.listed is None:
            records, problems = index_tar(Path(self.root))
        else:
            records, problems = self._files(), [entry for entry in self.listed if not isinstance(entry, ImageRecord)]
        if skipped is not None:
            skipped += problems
        elif problems:
            raise self.named(DataError(f"{self.root} {problems[0][1]}."))
        return records

    def size(self) -> int | None:
        """Bytes of the tar, or of all images of a folder's shard; None if a server does not say."""
        if self.is_remote:
            return remote_size(self.root)
        return self.root.stat().st_size if self.listed is None else sum(record.length for record in self._files())

    def sha256(self, skip: bool = False) -> str:
        """Digest of the tar's bytes; of a folder's shard, the digest over (relative path, digest) of its files.

        DataError for a file that cannot be read; with `skip`, "unreadable" stands for its digest.
        """
        if self.listed is None:
            return _digest(Path(self.root), skip)
        whole = hashlib.sha256()
        for record in self._files():
            whole.update(f"{record.path.relative_to(self.root)}\0{_digest(record.path, skip)}\n".encode())
        return whole.hexdigest()

    def describe(self, skip: bool = False) -> dict[str, Any]:
        """What a token shard's entry says of its source; `skip` as in `sha256`."""
        return {"kind": "tar" if self.is_tar else "folder", "size": self.size(), "sha256": self.sha256(skip)}

    def _files(self) -> list[ImageRecord]:
        return [entry for entry in self.listed or () if isinstance(entry, ImageRecord)]


def _digest(path: Path, skip: bool) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        if skip:
            return "unreadable"
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None


def open_source(images: str | Path | Sequence[str | Path]) -> list[SourceShard]:
    """The shards of a source; tars are not opened yet.

    `images` is a tar, a directory with tars, a folder of images or of class folders, a brace pattern such as
    `data/train-{000000..000015}.tar`, or a list of tars; tars may be URLs (http, https, and what fsspec opens).

    Raises DataError for a path that is missing or a folder without images, UsageError for what is no source.
    """
    places = _expand(images)
    first = places[0]
    if len(places) == 1 and isinstance(first, Path) and first.is_dir():
        tars = sorted(first.glob("*.tar"))
        shards = (
            [_tar_shard(tar) for tar in tars]
            if tars
            else [SourceShard(name, first, entries) for name, entries in list_folder(first)]
        )
    elif len(places) == 1 and isinstance(first, str) and not first.endswith(".tar"):
        shards = [_tar_shard(url) for url in list_tars(first)]
    else:
        shards = [_tar_shard(place) for place in places]
    _refuse_equal_names(shards)
    return shards


def read_records(images: str | Path | Sequence[str | Path], skipped: Skipped | None = None) -> list[ImageRecord]:
    """The records of all images of a local source; `skipped` as in `SourceShard.index`.

    Raises DataError as `open_source` and `SourceShard.index` do, and for a key that stands in two shards; UsageError
    for remote tars, which are read only shard by shard.
    """
    shards = {shard.name: shard for shard in open_source(images)}
    remote = next((shard for shard in shards.values() if shard.is_remote), None)
    if remote:
        raise UsageError(f"{remote.root} is remote; this command needs local files, download them first.")
    keys = KeyLedger()
    found = {name: shard.index(skipped) for name, shard in shards.items()}
    for name, records in found.items():
        keys.add(name, (record.key for record in records))
    keys.refuse_doubles(lambda name: [record.key for record in found[name]])
    return [record for records in found.values() for record in records]


class KeyLedger:
    """Which shard has which key, at 8 bytes a key, to find a key that stands in two shards."""

    def __init__(self):
        self._digests: dict[str, np.ndarray] = {}

    def add(self, shard: str, keys: Iterable[str]) -> None:
        """Notes the keys of one shard."""
        digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        self._digests[shard] = np.frombuffer(b"".join(digests), dtype=np.uint64)

    def merge(self, other: "KeyLedger") -> None:
        """Notes what another ledger holds."""
        self._digests |= other._digests

    def __contains__(self, shard: str) -> bool:
        return shard in self._digests

    def count(self, shard: str) -> int:
        """How many keys a shard has; 0 for one that was not added."""
        return len(self._digests.get(shard, ()))

    def refuse_doubles(self, keys_of: Callable[[str], Iterable[str]]) -> None:
        """Raises DataError if two shards have a key in common; `keys_of(shard)` is asked for its name."""
        names = sorted(self._digests)
        if not names:
            return
        digests = np.concatenate([self._digests[name] for name in names])
        owners = np.repeat(np.arange(len(names)), [len(self._digests[name]) for name in names])
        order = np.argsort(digests, kind="stable")
        (equal,) = np.nonzero(digests[order[1:]] == digests[order[:-1]])
        for at in equal:
            first, second = (names[owners[place]] for place in order[at : at + 2])
            common = set(keys_of(first)) & set(keys_of(second)) if first != second else None
            if common:
                raise DataError(f"key {min(common)!r} is in both {first} and {second}; keys must be unique.")


def _expand(images: str | Path | Sequence[str | Path]) -> list[Path | str]:
    patterns = [images] if isinstance(images, str | Path) else list(images)
    if not patterns:
        raise UsageError("No images were given; name a tar, a folder or a brace pattern.")
    try:
        names = [name for pattern in patterns for name in braceexpand.braceexpand(str(pattern))]
    except ValueError as error:
        raise UsageError(f"IMAGES {images} is no pattern such as train-{{000..015}}.tar ({error}).") from None
    places = [name if is_url(name) else as_path(name) for name in names]
    for path in (place for place in places if isinstance(place, Path)):
        try:
            there = path.exists()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from None
        if not there:
            raise DataError(f"{path} does not exist; IMAGES takes a tar, a folder or a brace pattern of tars.")
        if path.is_dir() and len(places) > 1:
            raise UsageError(f"{path} is a folder; give one folder alone, or tars.")
    return places


def _tar_shard(place: Path | str) -> SourceShard:
    return SourceShard(str(place).split("?")[0].rpartition("/")[2].removesuffix(".tar"), place)


def _refuse_equal_names(shards: Sequence[SourceShard]) -> None:
    places: dict[str, Path | str] = {}
    for shard in shards:
        if shard.name in places:
            raise DataError(f"{shard.root} and {places[shard.name]} have the same base name; rename one of them.")
        places[shard.name] = shard.root
