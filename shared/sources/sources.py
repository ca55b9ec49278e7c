"""Sources of images: WebDataset tars, local or remote, or a folder of (class) folders, as shards of records.

Opening a source reads no tar, except for the headers of a tar of tars; compressed tars are unpacked. Staging a shard
downloads a remote tar; indexing it reads its headers.
"""

import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError
from ..labels.label_list import read_label_list
from ..labels.parsing import Label, label_of_name
from ..labels.tar_labels import TarLabels
from ..runtime.console import say
from ..storage.compressed import is_compressed, is_tar_name, unpack, unpacked, unpacked_path, without_suffix
from ..storage.files import sha256_file
from ..storage.remote import download, list_tars, remote_size, without_query
from .folders import FolderListing, list_folder, shards_of, tars_in
from .keys import KeyLedger, Skipped, key_of
from .listings import listed
from .options import DEFAULT, SourceOptions
from .passed import PassedOver, count_of, first_to_last
from .places import Place, expand
from .records import ImageRecord
from .tars import Region, index_tar, nested_tars

Images = str | Path | Sequence[str | Path]
"""IMAGES: a tar, a folder, a pattern, a URL, or several of them."""
_LOOKED_INTO = 16
"""Of a source of more tars, none is looked into for a tar of tars."""
_SYNSET = re.compile(r"n\d{8}")
_BLOCK = 1 << 22


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
    labelling: Labelling | None = None
    """Where the labels come from, if not from the source alone."""
    options: SourceOptions = DEFAULT
    region: Region | None = None
    """Where the tar lies in the tar of tars at `root`."""
    class_label: Label | None = None
    """The label of all images of a tar that is a class: the class of its name."""

    @property
    def is_tar(self) -> bool:
        """Whether the shard is a tar and not a part of a folder."""
        return self.listed is None

    @property
    def is_remote(self) -> bool:
        """Whether the shard is a tar at a URL."""
        return isinstance(self.root, str)

    @property
    def kind(self) -> str:
        """What a store calls the source: "folder", "tar", or "tar in tar", whose offsets are those in the outer tar."""
        return "folder" if not self.is_tar else "tar" if self.region is None else "tar in tar"

    @property
    def title(self) -> str:
        """What messages call the shard's tar or folder; a URL is without its query, which may hold a signature."""
        return without_query(str(self.root)) + (f" ({self.region.name})" if self.region else "")

    @contextmanager
    def staged(self) -> Iterator["SourceShard"]:
        """Yields the shard with local files; a remote tar is downloaded for the time of the block.

        Raises DataError if it cannot be downloaded.
        """
        if not isinstance(self.root, str):
            yield self
            return
        with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
            path = Path(folder, _file_name(self.root))
            download(self.root, path)
            if is_compressed(path.name):
                packed, path = path, Path(folder, f"{self.name}.tar")
                unpack(packed, path)
                packed.unlink()
            local = replace(self, root=path, url=self.root)
            try:
                yield local
            except DataError as error:
                raise local.named(error) from None

    def named(self, error: DataError) -> DataError:
        """`error` with the shard's URL in its message instead of the path of the download."""
        if self.url is None:
            return error
        return type(error)(str(error).replace(str(self.root), without_query(self.url)))

    def index(
        self, skipped: Skipped | None = None, unlabelled: Skipped | None = None, passed: PassedOver | None = None
    ) -> list[ImageRecord]:
        """The shard's images in order, from headers alone.

        Anything unusable (a truncated or damaged part, a key with several pictures, a name that cannot be a key) is
        added to `skipped`; without such a list it raises a DataError that names it. An image whose label cannot be read
        has none; the reason is added to `unlabelled`, or raised if neither list is given. `passed` counts the members
        of a tar that are passed over.
        """
        records, problems, label_problems = self._listing(passed)
        if skipped is not None:
            skipped += problems
        elif problems:
            raise self.named(DataError(f"{self.title} {problems[0][1]}."))
        if unlabelled is not None:
            unlabelled += label_problems
        elif label_problems and skipped is None:
            raise self.named(DataError(f"{self.title} {label_problems[0][1]}."))
        return records

    def _listing(self, passed: PassedOver | None) -> tuple[list[ImageRecord], Skipped, Skipped]:
        """The shard's images, what is unusable, and which labels could not be read."""
        labelling = self.labelling or Labelling()
        if self.listed is None:
            records, problems, label_problems = self._tar_listing(labelling.field, passed)
        else:
            records, problems = self.files, [entry for entry in self.listed if not isinstance(entry, ImageRecord)]
            label_problems = []
        if labelling.by_key is None:
            return records, problems, label_problems
        labels = labelling.by_key
        records = [replace(record, label=labels.get(record.key)) for record in records]
        missing = [record.key for record in records if record.label is None]
        return records, problems, [(key, f"has image {key!r}, and {labelling.file} no label for it") for key in missing]

    def _tar_listing(
        self, label_field: str | None, passed: PassedOver | None
    ) -> tuple[list[ImageRecord], Skipped, Skipped]:
        """`_listing` of a tar, from its last listing if it has not changed since."""
        path, options = Path(self.root), self.options
        tar_labels = TarLabels(path, label_field)
        prefix = f"{self.name}/" if options.prefixes else ""
        problems: Skipped = []

        def read(over: PassedOver) -> tuple[list[ImageRecord], bool]:
            records, found = index_tar(
                path,
                options,
                region=self.region,
                prefix=prefix,
                tar_labels=tar_labels,
                label=self.class_label,
                passed=over,
            )
            problems.extend(found)
            return records, not problems and not tar_labels.problems and self.url is None

        depends_on = {
            "extensions": [options.until("tar"), *options.extensions],
            "fields": options.image_fields,
            "prefix": prefix,
            "region": None if self.region is None else [self.region.offset, self.region.length],
            "label": self.class_label,
            "label_field": label_field,
            "class_names": tar_labels.class_names,
        }
        over = PassedOver() if passed is None else passed
        records = listed(path, depends_on, options.max_pixels, over, read)
        return records, problems, tar_labels.problems

    def size(self) -> int | None:
        """Bytes of the tar, or of all images of a folder's shard; None if a server does not tell, or for a remote tar
        that is compressed."""
        if isinstance(self.root, str):
            return None if is_compressed(_file_name(self.root)) else remote_size(self.root)
        if self.region is not None:
            return self.region.length
        return self.root.stat().st_size if self.listed is None else sum(record.length for record in self.files)

    def sha256(self, skip: bool = False) -> str:
        """Hex SHA-256 of the tar's bytes, or of (relative path, digest) of all files of a folder's shard.

        Raises DataError if a file cannot be read; with `skip`, "unreadable" takes the place of its digest.
        """
        if self.region is not None:
            return _digest_region(Path(self.root), self.region, skip)
        if self.listed is None:
            return _digest(Path(self.root), skip)
        digest = hashlib.sha256()
        for record in self.files:
            digest.update(f"{record.path.relative_to(self.root)}\0{_digest(record.path, skip)}\n".encode())
        return digest.hexdigest()

    def describe(self, skip: bool = False) -> dict[str, Any]:
        """The `source` of a token shard's entry: kind, size and digest, and the options that are not the default ones;
        `skip` as in `sha256`."""
        options = self.options.to_json("tar" if self.is_tar else "folder")
        described = {"kind": self.kind, "size": self.size(), "sha256": self.sha256(skip)}
        return described | ({"options": options} if options else {})

    @property
    def files(self) -> list[ImageRecord]:
        """A folder's images that can be used."""
        return [entry for entry in self.listed or () if isinstance(entry, ImageRecord)]


def _digest(path: Path, skip: bool) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        if skip:
            return "unreadable"
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None


def _digest_region(path: Path, region: Region, skip: bool) -> str:
    digest, remaining = hashlib.sha256(), region.length
    try:
        with open(path, "rb") as file:
            file.seek(region.offset)
            while remaining and (block := file.read(min(_BLOCK, remaining))):
                digest.update(block)
                remaining -= len(block)
    except OSError as error:
        if skip:
            return "unreadable"
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def open_source(images: Images, options: SourceOptions = DEFAULT, *, skip: bool = False) -> list[SourceShard]:
    """The shards of a source; tars are not opened yet. One line says what was taken and what was passed over.

    `images` is one or several of: a tar, a folder of tars, a folder of images or of class folders, a pattern with
    braces or wildcards such as `data/train-{000000..000015}.tar`; tars may be compressed, hold tars, and be URLs (http,
    https and all that fsspec opens). With `skip`, tars of a range that do not exist are left out.

    Raises DataError for a missing path or a folder without images, UsageError for an invalid pattern, for a folder that
    may mean two things, and for folders of images beside tars.
    """
    passed = PassedOver()
    tars: list[Place] = []
    folders: list[Path] = []
    for place in expand(images, skip):
        if isinstance(place, Path) and place.is_dir():
            found = tars_in(place, passed)
            tars += found
            folders += [] if found else [place]
        elif isinstance(place, str) and not is_tar_name(place.partition("?")[0]):
            tars += list_tars(place)
        else:
            tars.append(place)
    tars = list(dict.fromkeys(tars))
    if tars and folders:
        raise UsageError(
            f"{folders[0]} is a folder of images and {_shown(tars[0])} a tar; give only one kind at a time."
        )
    shards = _folder_shards(folders, options, passed) if folders else _tar_shards(tars, options)
    taken = _what_was_taken(shards, folders)
    say(f"{shown_images(images)}: {taken}{f'; passed over {passed}' if passed else ''}.")
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
    remote = next((str(shard.root) for shard in shards if shard.is_remote), None)
    if remote:
        raise UsageError(
            f"--labels {file} needs local images to find its lines, and {without_query(remote)} is remote; download "
            "them."
        )
    # Where lines count images, one that cannot be used would shift the labels of all that follow.
    keys = [record.key for shard in shards for record in shard.index([] if listed.names else None, [])]
    until = shards[0].options.until("tar" if shards[0].is_tar else "folder")
    by_key = listed.by_key(keys, lambda name: key_of(name, until))
    if not by_key:
        raise DataError(f"{file} names none of the {len(keys):,} images, such as {keys[0]!r}; give the list of these.")
    return [replace(shard, labelling=Labelling(None, by_key, file)) for shard in shards]


def _folder_shards(folders: Sequence[Path], options: SourceOptions, passed: PassedOver) -> list[SourceShard]:
    alone = len(folders) == 1
    named = dict.fromkeys(folders, "folder") if alone else _unique_names(folders)
    listings: list[FolderListing] = []
    for folder in folders:
        prefix = f"{named[folder]}/" if options.prefixes and not alone else ""
        listings.append(list_folder(folder, options, prefix))
        passed.merge(listings[-1].passed)
    listed = shards_of(listings, [named[folder] for folder in folders])
    return [SourceShard(name, root, entries, options=options) for name, root, entries in listed]


def _tar_shards(tars: Sequence[Place], options: SourceOptions) -> list[SourceShard]:
    local = [_unpacked(tar) if isinstance(tar, Path) else tar for tar in tars]
    names = _unique_names(tars)
    few = len(local) <= _LOOKED_INTO
    inner = {tar: nested_tars(path) for tar, path in zip(tars, local, strict=True) if few and isinstance(path, Path)}
    shards = []
    for tar, path in zip(tars, local, strict=True):
        regions = inner.get(tar) or []
        shards += [SourceShard(_inner_name(region), path, region=region, options=options) for region in regions]
        if not regions:
            shards.append(SourceShard(names[tar], path, options=options))
    double = next((name for name, count in Counter(shard.name for shard in shards).items() if count > 1), None)
    if double is not None:
        raise DataError(f"two tars inside the given ones have the same base name {double!r}; rename one of them.")
    return _with_class_labels(shards, options)


def _inner_name(region: Region) -> str:
    return without_suffix(region.name.removeprefix("./")).replace("/", "__")


def _with_class_labels(shards: list[SourceShard], options: SourceOptions) -> list[SourceShard]:
    """Labels the images of class tars, whose names are the classes."""
    inside = all(shard.region is not None for shard in shards)
    if options.label_from != "tar" and not inside and not all(_SYNSET.fullmatch(shard.name) for shard in shards):
        return shards
    return [replace(shard, class_label=label_of_name(_class_name(shard))) for shard in shards]


def _class_name(shard: SourceShard) -> str:
    return shard.name if shard.region is None else without_suffix(shard.region.name.rpartition("/")[2])


def _unpacked(tar: Path) -> Path:
    if not is_compressed(tar):
        return tar
    say(f"{tar} is compressed; it is unpacked once, to {unpacked_path(tar)}.")
    return unpacked(tar)


def _file_name(place: Path | str) -> str:
    return str(place).partition("?")[0].rpartition("/")[2]


def _unique_names(places: Sequence[Place]) -> dict[Place, str]:
    """The name of each shard: the base name, or what tells the paths apart if two base names are equal.

    Raises DataError for a hidden name or two equal ones.
    """
    names = {place: without_suffix(_file_name(place)) for place in places}
    if len(set(names.values())) < len(names):
        paths = {place: _as_text(place) for place in places}
        common = os.path.commonpath([path.rpartition("/")[0] for path in paths.values()]) if _one_kind(paths) else ""
        names = {
            place: without_suffix(path[len(common) :].lstrip("/")).replace("/", "__") for place, path in paths.items()
        }
    owners: dict[str, Place] = {}
    for place, name in names.items():
        if name in owners:
            raise DataError(f"{_shown(place)} and {_shown(owners[name])} have the same base name; rename one of them.")
        if name.startswith(".") or not name:
            raise DataError(f"{_shown(place)} has a hidden name, which a shard cannot have; rename it.")
        owners[name] = place
    return names


def _as_text(place: Place) -> str:
    return os.path.abspath(place) if isinstance(place, Path) else place.partition("?")[0].partition("://")[2]


def _one_kind(paths: Mapping[Place, str]) -> bool:
    return len({isinstance(place, Path) for place in paths}) == 1


def _shown(place: Place) -> str:
    return without_query(str(place))


def shown_images(images: Images) -> str:
    """IMAGES in a message: the first of them without its query, and how many there are."""
    given = [images] if isinstance(images, str | Path) else list(images)
    more = f" and {len(given) - 1} more" if len(given) > 1 else ""
    return f"{_shown(str(given[0]))}{more}"


def _what_was_taken(shards: Sequence[SourceShard], folders: Sequence[Path]) -> str:
    if not folders:
        inside = " inside tars" if shards[0].region is not None else ""
        labelled = ", each a class" if shards[0].class_label is not None else ""
        names = first_to_last(shard.region.name if shard.region else _file_name(shard.root) for shard in shards)
        return f"took {count_of(len(shards), 'tar')}{inside}{labelled} ({names})"
    entries = [entry for shard in shards for entry in shard.listed or ()]
    records = [entry for entry in entries if isinstance(entry, ImageRecord)]
    classes = sorted(
        {_top_folder(record, shard) for shard in shards for record in shard.files if record.label is not None}
    )
    within = f" in {count_of(len(classes), 'class folder')} ({first_to_last(classes)})" if classes else ""
    unusable = len(entries) - len(records)
    return f"took {count_of(len(records), 'image')}{within}" + (f"; {unusable:,} cannot be used" if unusable else "")


def _top_folder(record: ImageRecord, shard: SourceShard) -> str:
    return record.path.relative_to(shard.root).parts[0]


def read_records(
    images: Images,
    skipped: Skipped | None = None,
    options: SourceOptions = DEFAULT,
    *,
    shards: Sequence[SourceShard] | None = None,
    labels: str | Path | None = None,
    label_field: str | None = None,
    passed: PassedOver | None = None,
    unlabelled: Skipped | None = None,
) -> list[ImageRecord]:
    """The records of all images of a local source.

    `skipped` and `unlabelled` are as in `SourceShard.index`, labels as in `with_labels`. `shards` are those of `images`
    if it was opened already. `passed` counts the members of tars that are passed over; without it a line says which
    they are. Raises DataError as `open_source` and `SourceShard.index` do, and for a key that is in two shards;
    UsageError for remote tars, which have to be staged one by one.
    """
    opened = with_labels(open_source(images, options) if shards is None else shards, labels, label_field)
    remote = next((shard for shard in opened if shard.is_remote), None)
    if remote:
        raise UsageError(f"{remote.title} is remote; this command needs local files, download them first.")
    ledger, over = KeyLedger(), PassedOver() if passed is None else passed
    records = {shard.name: shard.index(skipped, unlabelled, over) for shard in opened}
    for name, of_shard in records.items():
        ledger.add(name, (record.key for record in of_shard))
    ledger.refuse_doubles(lambda name: [record.key for record in records[name]])
    if passed is None:
        say_passed_over(over)
    return [record for of_shard in records.values() for record in of_shard]


def say_passed_over(passed: PassedOver) -> None:
    """Says which members of tars were passed over, if any were."""
    if passed:
        say(f"In the tars, passed over {passed}.")
