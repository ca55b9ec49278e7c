"""Where images come from: WebDataset tars (local or remote) or a folder of (class) folders, as shards of records.

Nothing is read until a shard is staged (a remote tar is then downloaded) and indexed (its headers are read).
"""

import hashlib
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import braceexpand
import numpy as np

from .errors import DataError, UsageError
from .files import sha256_file
from .images import ImageRecord
from .remote import download, is_url, list_tars, remote_size

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Pictures that we do not read; where they stand alone, they must not be passed over in silence.
_OTHER_PICTURES = ("avif", "bmp", "gif", "heic", "jp2", "jpe", "jxl", "tif", "tiff")
FOLDER_SHARD_IMAGES = 1000
Skipped = list[tuple[str, str]]
"""(key, reason) of what was left out; the key is "" where a part of a tar has none."""


@dataclass(frozen=True)
class SourceShard:
    """A unit of work: one tar, or up to 1,000 images of a folder.

    `root` is the tar (a path or a URL) or the folder; `listed` are a folder's images, or (key, reason) where one
    cannot be used.
    """

    name: str
    root: Path | str
    listed: tuple[ImageRecord | tuple[str, str], ...] | None = None

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
            yield replace(self, root=path)

    def index(self, skipped: Skipped | None = None) -> list[ImageRecord]:
        """The shard's images in order, from headers alone.

        What cannot be used (a cut or damaged part, a key that stands twice, a label that is no number, a name that
        cannot be a key) is added to `skipped`; without such a list it raises a DataError that names it.
        """

        def problem(key: str, reason: str) -> None:
            if skipped is None:
                raise DataError(f"{self.root} {reason}.")
            skipped.append((key, reason))

        if self.listed is None:
            return _index_tar(Path(self.root), problem)
        records = []
        for entry in self.listed:
            if isinstance(entry, ImageRecord):
                records.append(entry)
            else:
                problem(*entry)
        return records

    def size(self) -> int | None:
        """Bytes of the tar, or of all images of a folder's shard; None if a server does not say."""
        if self.is_remote:
            return remote_size(self.root)
        return self.root.stat().st_size if self.listed is None else sum(record.length for record in self._files())

    def sha256(self) -> str:
        """Digest of the tar's bytes; of a folder's shard, the digest over (relative path, digest) of its files."""
        if self.is_tar:
            return sha256_file(self.root)
        whole = hashlib.sha256()
        for record in self._files():
            whole.update(f"{record.path.relative_to(self.root)}\0{sha256_file(record.path)}\n".encode())
        return whole.hexdigest()

    def _files(self) -> list[ImageRecord]:
        return [entry for entry in self.listed or () if isinstance(entry, ImageRecord)]


def key_of(name: str) -> str:
    """WebDataset's `__key__`: the path and the base name up to its first dot."""
    directory, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{directory}/{stem}" if directory else stem


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
        shards = [_tar_shard(tar) for tar in tars] if tars else _list_folder(first)
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
    places = [name if is_url(name) else Path(name) for name in names]
    for path in (place for place in places if isinstance(place, Path)):
        if not path.exists():
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


Problem = Callable[[str, str], None]


def _index_tar(path: Path, problem: Problem) -> list[ImageRecord]:
    found: dict[str, tarfile.TarInfo] = {}
    classes: dict[str, tarfile.TarInfo] = {}
    others: dict[str, str] = {}
    for member in _members(path, problem):
        key, extension = key_of(member.name), member.name.rpartition(".")[2].lower()
        reason = _unfit(member.name)
        if reason and extension in EXTENSIONS:
            problem(repr(key)[1:-1], reason)
        elif member.name.rpartition("/")[2].startswith("."):
            continue  # such as macOS's `._a.jpg` beside `a.jpg`; WebDataset gives such files no key
        elif extension in EXTENSIONS:
            if key in found:
                problem(key, f"holds key {key!r} twice; keys must be unique")
            else:
                found[key] = member
        elif extension == "cls":
            classes[key] = member
        elif extension in _OTHER_PICTURES:
            others[key] = member.name
    for key, name in others.items():
        if key not in found:
            problem(key, f"holds {name}, which is none of {', '.join(EXTENSIONS)}; convert it")
    if not found:
        problem("", f"holds no images ({', '.join(EXTENSIONS)}); give tars in WebDataset layout")
    labels = _read_labels(path, classes, problem)
    return [
        ImageRecord(key, path, member.offset_data, member.size, labels.get(key))
        for key, member in found.items()
        if key not in classes or key in labels
    ]


def _unfit(name: str) -> str | None:
    """Why a name cannot be a key, or None."""
    if name.startswith("/") or ".." in name.split("/"):
        return f"holds {name!r}, a name that leaves its folder; rename it"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return f"holds {name!r}, and that name is not UTF-8; rename it"
    return None


def _members(path: Path, problem: Problem) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, from its headers, up to where it is cut or damaged."""
    whole = path.stat().st_size
    if whole == 0:
        problem("", "is empty (0 bytes); make or download it again")
        return
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                if member.offset_data + member.size > whole:
                    problem(key_of(member.name), f"is truncated inside {member.name}; make or download it again")
                    return
                yield member
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:
        problem("", f"is no readable tar ({error}); give an uncompressed, whole tar")
        return
    with open(path, "rb") as file:
        file.seek(end)
        # tarfile takes a cut or damaged header for the end; a tar really ends with blocks of zeros.
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            problem("", f"is truncated or damaged at byte {end}; make or download it again")


def _read_labels(path: Path, classes: dict[str, tarfile.TarInfo], problem: Problem) -> dict[str, int]:
    labels = {}
    with open(path, "rb") as file:
        for key, member in classes.items():
            file.seek(member.offset_data)
            text = file.read(member.size)
            try:
                labels[key] = int(text)
            except ValueError:
                problem(key, f"holds {text[:20]!r} in {member.name}, not a class number")
    return labels


def _list_folder(root: Path) -> list[SourceShard]:
    listed: dict[str, ImageRecord | tuple[str, str]] = {}
    doubles: list[tuple[str, tuple[str, str]]] = []
    for name in _pictures_under(root):
        key = key_of(name)
        if key in listed:
            first = listed[key].path.relative_to(root) if isinstance(listed[key], ImageRecord) else listed[key][0]
            doubles.append((key, (key, f"holds {first} and {name}, which have the same key {key!r}")))
        else:
            listed[key] = _look_at(root, name, key)
    if not listed:
        raise DataError(f"{root} holds neither tars nor images ({', '.join(EXTENSIONS)}).")
    labels = _folder_labels(listed)
    entries = [
        (key, replace(entry, label=labels.get(key)) if isinstance(entry, ImageRecord) else entry)
        for key, entry in listed.items()
    ]
    entries = [entry for _, entry in sorted(entries + doubles, key=lambda item: item[0])]
    return [
        SourceShard(f"folder-{number:06d}", root, tuple(entries[start : start + FOLDER_SHARD_IMAGES]))
        for number, start in enumerate(range(0, len(entries), FOLDER_SHARD_IMAGES))
    ]


def _pictures_under(root: Path) -> list[str]:
    names = []
    for directory, _, files in os.walk(root, followlinks=True):
        for file in files:
            extension = file.rpartition(".")[2].lower() if "." in file else ""
            if extension in EXTENSIONS + _OTHER_PICTURES and not file.startswith("."):
                names.append(Path(directory, file).relative_to(root).as_posix())
    return sorted(names)


def _look_at(root: Path, name: str, key: str) -> ImageRecord | tuple[str, str]:
    path = root / name
    reason = _unfit(name)
    if reason:
        return repr(key)[1:-1], reason
    if name.rpartition(".")[2].lower() in _OTHER_PICTURES:
        return key, f"holds {name}, which is none of {', '.join(EXTENSIONS)}; convert it"
    if not path.exists():
        return key, f"holds {name}, a link to nowhere; remove it or restore its target"
    if not path.is_file():
        return key, f"holds {name}, which is no plain file; remove it"
    return ImageRecord(key, path, 0, path.stat().st_size, None)


def _folder_labels(keys: Iterable[str]) -> dict[str, int]:
    """A label for every image if all of them lie in class folders: the folder's rank in sorted order."""
    folders = {key: key.split("/")[0] if "/" in key else None for key in keys}
    if None in folders.values():
        return {}
    number = {name: index for index, name in enumerate(sorted(set(folders.values())))}
    return {key: number[name] for key, name in folders.items()}
