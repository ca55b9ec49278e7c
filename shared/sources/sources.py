"""Sources of images: WebDataset tars, local or remote, or a folder of (class) folders, as shards of records.

Opening a source reads no tar. Staging a shard downloads a remote tar; indexing it reads its headers.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, UsageError
from ..labels.label_list import read_label_list
from ..labels.parsing import Label
from ..labels.tar_labels import TarLabels
from ..storage.files import sha256_file
from ..storage.remote import as_path, download, is_url, list_tars, remote_size
from .folders import list_folder
from .keys import Skipped, key_digests, key_of
from .records import ImageRecord
from .tars import index_tar


@dataclass(frozen=True)
class Labelling:
    """Labels that a source does not carry in `.cls` members or class folders."""

    field: str | None = None
    """The field of the JSON members of tars that holds the label."""
    by_key: Mapping[str, Label] | None = None
    """The label of each image, from the list in `file`; it takes the place of what the source carries."""
    file: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """What a store records: the digest of the list, or the field."""
        return {"list_sha256": sha256_file(self.file)} if self.file else {"field": self.field}


@dataclass(frozen=True)
class SourceShard:
    """One tar, or up to 1,000 images of a folder: the unit of work."""

    name: str
    root: Path | str
    """The tar (a path, or a URL as text) or the folder."""
    listed: tuple[ImageRecord | tuple[str, str], ...] | None = None
    """A folder's images, or (key, reason) for one that cannot be used; None for a tar."""
    url: str | None = None
    """The URL from which the tar at `root` was downloaded, while it is staged."""
    labelling: "Labelling | None" = None
    """Where the labels come from, if not from the source alone."""

    @property
    def is_tar(self) -> bool:
        """Whether the shard is a tar and not a part of a folder."""
        return self.listed is None

    @property
    def is_remote(self) -> bool:
        """Whether the shard is a tar at a URL."""
        return isinstance(self.root, str)

    @contextmanager
    def staged(self) -> Iterator["SourceShard"]:
        """Yields the shard with local files; a remote tar is downloaded for the time of the block.

        Raises DataError if it cannot be downloaded.
        """
        if not isinstance(self.root, str):
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
            path = Path(folder, f"{self.name}.tar")
            download(self.root, path)
            local = replace(self, root=path, url=self.root)
            try:
                yield local
            except DataError as error:
                raise local.named(error) from None

    def named(self, error: DataError) -> DataError:
        """`error` with the shard's URL in its message instead of the path of the download."""
        return error if self.url is None else type(error)(str(error).replace(str(self.root), self.url))

    def index(self, skipped: Skipped | None = None, unlabelled: Skipped | None = None) -> list[ImageRecord]:
        """The shard's images in order, from headers alone.

        Anything unusable (a truncated or damaged part, a duplicate key, a name that cannot be a key) is added to
        `skipped`; without such a list it raises a DataError that names it. An image whose label cannot be read has
        none; the reason is added to `unlabelled`, or raised if neither list is given.
        """
        records, problems, label_problems = self._listing()
        if skipped is not None:
            skipped += problems
        elif problems:
            raise self.named(DataError(f"{self.root} {problems[0][1]}."))
        if unlabelled is not None:
            unlabelled += label_problems
        elif label_problems and skipped is None:
            raise self.named(DataError(f"{self.root} {label_problems[0][1]}."))
        return records

    def _listing(self) -> tuple[list[ImageRecord], Skipped, Skipped]:
        """The shard's images, what is unusable, and which labels could not be read."""
        labelling = self.labelling or Labelling()
        if self.listed is None:
            tar_labels = TarLabels(Path(self.root), labelling.field)
            records, problems = index_tar(Path(self.root), tar_labels)
            label_problems = tar_labels.problems
        else:
            records, problems = self._files(), [entry for entry in self.listed if not isinstance(entry, ImageRecord)]
            label_problems = []
        if labelling.by_key is None:
            return records, problems, label_problems
        labels = labelling.by_key
        records = [replace(record, label=labels.get(record.key)) for record in records]
        missing = [record.key for record in records if record.label is None]
        return records, problems, [(key, f"has image {key!r}, and {labelling.file} no label for it") for key in missing]

    def size(self) -> int | None:
        """Bytes of the tar, or of all images of a folder's shard; None if a server does not tell."""
        if isinstance(self.root, str):
            return remote_size(self.root)
        return self.root.stat().st_size if self.listed is None else sum(record.length for record in self._files())

    def sha256(self, skip: bool = False) -> str:
        """Hex SHA-256 of the tar's bytes, or of (relative path, digest) of all files of a folder's shard.

        Raises DataError if a file cannot be read; with `skip`, "unreadable" takes the place of its digest.
        """
        if self.listed is None:
            return _digest(Path(self.root), skip)
        digest = hashlib.sha256()
        for record in self._files():
            digest.update(f"{record.path.relative_to(self.root)}\0{_digest(record.path, skip)}\n".encode())
        return digest.hexdigest()

    def describe(self, skip: bool = False) -> dict[str, Any]:
        """The `source` of a token shard's entry: kind, size and digest; `skip` as in `sha256`."""
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

    `images` is a tar, a directory of tars, a folder of images or of class folders, a brace pattern such as
    `data/train-{000000..000015}.tar`, or a list of tars; tars may be URLs (http, https and all that fsspec opens).

    Raises DataError for a missing path, a folder without images or two tars of one name, UsageError for an invalid
    pattern or a folder among several sources.
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


def with_labels(shards: Sequence[SourceShard], labels: str | Path | None, label_field: str | None) -> list[SourceShard]:
    """The shards with the labels of the list in the file `labels`, or of a field of JSON members.

    With `labels`, `label_field` is the list's label column. Raises DataError for a list that cannot be read or does not
    fit the images; UsageError for `label_field` alone with a folder, and for a list with remote images, whose keys
    would have to be known beforehand.
    """
    if labels is None and label_field is None:
        return list(shards)
    if labels is None:
        folder = next((shard.root for shard in shards if not shard.is_tar), None)
        if folder:
            raise UsageError(
                f"--label-field {label_field} reads .json members of tars, and {folder} is a folder; give its labels "
                "with --labels FILE."
            )
        return [replace(shard, labelling=Labelling(label_field)) for shard in shards]
    file = Path(labels)
    listed = read_label_list(file, label_field)
    remote = next((shard.root for shard in shards if shard.is_remote), None)
    if remote:
        raise UsageError(
            f"--labels {file} needs local images to find its lines, and {remote} is remote; download them."
        )
    # Where lines count images, one that cannot be used would shift the labels of all that follow.
    keys = [record.key for shard in shards for record in shard.index([] if listed.names else None, [])]
    by_key = listed.by_key(keys, key_of)
    if not by_key:
        raise DataError(f"{file} names none of the {len(keys):,} images, such as {keys[0]!r}; give the list of these.")
    return [replace(shard, labelling=Labelling(None, by_key, file)) for shard in shards]


def read_records(
    images: str | Path | Sequence[str | Path],
    skipped: Skipped | None = None,
    *,
    labels: str | Path | None = None,
    label_field: str | None = None,
) -> list[ImageRecord]:
    """The records of all images of a local source; `skipped` as in `SourceShard.index`, labels as in `with_labels`.

    Raises DataError as `open_source` and `SourceShard.index` do, and for a key that is in two shards; UsageError for
    remote tars, which have to be staged one by one.
    """
    shards = {shard.name: shard for shard in with_labels(open_source(images), labels, label_field)}
    remote = next((shard for shard in shards.values() if shard.is_remote), None)
    if remote:
        raise UsageError(f"{remote.root} is remote; this command needs local files, download them first.")
    ledger = KeyLedger()
    records = {name: shard.index(skipped) for name, shard in shards.items()}
    for name, of_shard in records.items():
        ledger.add(name, (record.key for record in of_shard))
    ledger.refuse_doubles(lambda name: [record.key for record in records[name]])
    return [record for of_shard in records.values() for record in of_shard]


class KeyLedger:
    """Detects a key that is in two shards, in 8 bytes per key."""

    def __init__(self) -> None:
        self._digests: dict[str, NDArray[np.uint64]] = {}

    def add(self, shard: str, keys: Iterable[str]) -> None:
        """Adds the keys of one shard."""
        self._digests[shard] = key_digests(keys)

    def merge(self, other: "KeyLedger") -> None:
        """Adds the shards of another ledger."""
        self._digests |= other._digests

    def __contains__(self, shard: str) -> bool:
        return shard in self._digests

    def count(self, shard: str) -> int:
        """How many keys a shard has; 0 for a shard that was not added."""
        return len(self._digests.get(shard, ()))

    def refuse_doubles(self, keys_of: Callable[[str], Iterable[str]]) -> None:
        """Raises DataError if two shards share a key; `keys_of(shard)` is called to name it."""
        names = sorted(self._digests)
        if not names:
            return
        digests = np.concatenate([self._digests[name] for name in names])
        owners = np.repeat(np.arange(len(names)), [len(self._digests[name]) for name in names])
        order = np.argsort(digests, kind="stable")
        (equal,) = np.nonzero(digests[order[1:]] == digests[order[:-1]])
        for position in equal:
            first, second = (names[owner] for owner in owners[order[position : position + 2]])
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
        raise UsageError(f"IMAGES {images} is not a valid pattern such as train-{{000..015}}.tar ({error}).") from None
    places = [name if is_url(name) else Path(str(as_path(name))) for name in names]
    for path in (place for place in places if isinstance(place, Path)):
        try:
            exists = path.exists()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from None
        if not exists:
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
