"""Folders of images: lists them in shards of up to 1,000, with the reasons why some cannot be used."""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import DataError, UsageError
from ..labels.parsing import Label, label_of_name
from ..storage.compressed import is_compressed, is_tar_name
from .keys import EXTENSIONS, OTHER_PICTURES, Skipped, extension_of, is_hidden, key_of, plain, unfit_name
from .options import DEFAULT, SourceOptions
from .passed import PassedOver
from .records import ImageRecord
from .tars import choose_picture

FOLDER_SHARD_IMAGES = 1000
"""Images per shard of a folder."""
Listed = ImageRecord | tuple[str, str]
"""An image, or (key, reason) for one that cannot be used."""
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


@dataclass(frozen=True)
class FolderListing:
    """The images of a folder by key, and whether a folder of each is its class."""

    root: Path
    entries: dict[str, list[Listed]]
    passed: PassedOver

    @property
    def classes(self) -> set[str]:
        """The names of the class folders, if every image lies in one; otherwise none."""
        return {key.split("/")[0] for key in self.entries} if all("/" in key for key in self.entries) else set()

    @property
    def count(self) -> int:
        """How many images can be used."""
        return sum(isinstance(entry, ImageRecord) for entries in self.entries.values() for entry in entries)


def tars_in(root: Path, passed: PassedOver) -> list[Path]:
    """The tars of a folder, sorted: those in it, or else those in its subfolders. None for a folder of images.

    Raises UsageError if it holds tars of two kinds, or tars and images, DataError if it cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            is_folder = {entry.name: _is_folder(entry) for entry in entries}
    except OSError as error:
        raise DataError(f"{root} cannot be read ({error.strerror}).") from None
    visible = [name for name in sorted(is_folder) if not is_hidden(name)]
    here = [root / name for name in visible if is_tar_name(name) and not is_folder[name]]
    folders = [root / name for name in visible if is_folder[name]]
    below = next((path for path in _files_below(folders, root) if _is_picture_or_tar(path)), None)
    beside = next((root / name for name in visible if _is_picture(name) and not is_folder[name]), None)
    if not here:
        if below is None or not is_tar_name(below.name):
            return []
        return _nested_tars(root, folders, beside, passed)
    other = next((tar for tar in here if is_compressed(tar) != is_compressed(here[0])), None) or beside or below
    if other is not None:
        raise _two_kinds(root, here[0], other)
    for name in sorted(is_folder.keys() - {tar.name for tar in here}):
        passed.add(name)
    return here


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _nested_tars(root: Path, folders: Sequence[Path], beside: Path | None, passed: PassedOver) -> list[Path]:
    """The tars in the subfolders of a folder that holds none itself."""
    _refuse_splits(root, [folder.name for folder in folders])
    tars: list[Path] = []
    other = beside
    for path in _files_below(folders, root):
        if is_tar_name(path.name):
            tars.append(path)
            if is_compressed(path) != is_compressed(tars[0]):
                other = other or path
        elif _is_picture(path.name):
            other = other or path
        else:
            passed.add(path.relative_to(root).as_posix())
    if other is not None:
        raise _two_kinds(root, tars[0], other)
    return sorted(tars)


def _files_below(folders: Sequence[Path], root: Path) -> Iterator[Path]:
    for folder in folders:
        for directory, names, files in os.walk(folder, followlinks=True):
            parent = Path(directory)
            names[:] = sorted(name for name in names if not is_hidden(name) and not _is_cycle(parent / name))
            yield from (parent / file for file in sorted(files) if not is_hidden(file))


def _is_picture(name: str) -> bool:
    return extension_of(name) in EXTENSIONS + OTHER_PICTURES


def _is_picture_or_tar(path: Path) -> bool:
    return _is_picture(path.name) or is_tar_name(path.name)


def _two_kinds(root: Path, tar: Path, other: Path) -> UsageError:
    one, two = (path.relative_to(root).as_posix() for path in (tar, other))
    what = "two kinds of tars" if is_tar_name(two) else "tars and images"
    return UsageError(
        f"{root} holds {what}, {one!r} and {two!r}, and only one of them can be meant; move the others away, or give "
        f"the tars by a pattern such as '{tar.parent}/*.{'tar.*' if is_compressed(tar) else 'tar'}'."
    )


def _refuse_splits(root: Path, folders: Iterable[str]) -> None:
    """Refuses folders named train, val, ..., which are parts of a data set and not classes."""
    names = sorted(folders)
    splits = [name for name in names if name.lower() in _SPLITS]
    if len(splits) > 1 or (splits and names == splits):
        held = " and ".join(f"{name}/" for name in splits)
        raise UsageError(
            f"{root} holds {held}, parts of a data set and not classes; give one of them, such as {root / splits[0]}"
            f"{', or several of them' if len(splits) > 1 else ''}."
        )


def list_folder(root: Path, options: SourceOptions = DEFAULT, prefix: str = "") -> FolderListing:
    """The images of a folder; DataError if it has none or cannot be read, UsageError if it holds train/ and val/."""
    passed = PassedOver()
    pictures, unreadable_folders = _walk(root, options, passed)
    entries: dict[str, list[Listed]] = {folder: [(plain(folder), reason)] for folder, reason in unreadable_folders}
    by_key: dict[str, list[str]] = {}
    for name in pictures:
        by_key.setdefault(key_of(name, options.until("folder")), []).append(name)
    for key, names in by_key.items():
        entries[key] = _entries_of(root, names, key, options, prefix, passed)
    if not entries:
        raise DataError(
            f"{root} holds neither tars nor images ({', '.join(EXTENSIONS)})"
            f"{f'; passed over {passed}' if passed else ''}."
        )
    if not options.is_old:
        _refuse_splits(root, _top_folders(by_key.values()))
    return FolderListing(root, entries, passed)


def _top_folders(names: Iterable[list[str]]) -> set[str]:
    """Folders of a root without images of its own; of a lone one only if it has folders itself."""
    paths = [name.split("/") for of_key in names for name in of_key]
    folders = {path[0] for path in paths if len(path) > 1}
    if any(len(path) == 1 for path in paths) or (len(folders) == 1 and any(len(path) == 2 for path in paths)):
        return set()
    return folders


def shards_of(listings: Sequence[FolderListing], names: Sequence[str]) -> list[tuple[str, Path, tuple[Listed, ...]]]:
    """(name, root, images sorted by key) of each shard of folders whose shards are called by `names`."""
    classes = set().union(*(listing.classes for listing in listings)) if all(one.classes for one in listings) else set()
    labels: dict[str, Label] = {name: label_of_name(name) for name in classes}
    shards = []
    for listing, name in zip(listings, names, strict=True):
        ordered = tuple(
            replace(entry, label=labels.get(key.split("/")[0])) if isinstance(entry, ImageRecord) else entry
            for key, entries in sorted(listing.entries.items())
            for entry in entries
        )
        shards += [
            (f"{name}-{number:06d}", listing.root, ordered[start : start + FOLDER_SHARD_IMAGES])
            for number, start in enumerate(range(0, len(ordered), FOLDER_SHARD_IMAGES))
        ]
    return shards


def _walk(root: Path, options: SourceOptions, passed: PassedOver) -> tuple[list[str], Skipped]:
    """Names of all pictures under a folder, and (name with a slash, reason) of folders that cannot be listed."""
    names: list[str] = []
    unreadable_folders: Skipped = []
    pictures = frozenset(options.extensions + OTHER_PICTURES)

    def on_error(error: OSError) -> None:
        if Path(error.filename) == root:
            raise DataError(f"{root} cannot be read ({error.strerror}).")
        folder = f"{Path(error.filename).relative_to(root).as_posix()}/"
        unreadable_folders.append((folder, f"holds {folder!r}, a folder that cannot be listed ({error.strerror})"))

    for directory, folders, files in os.walk(root, followlinks=True, onerror=on_error):
        parent = Path(directory)
        below = "" if parent == root else f"{parent.relative_to(root).as_posix()}/"
        for folder in sorted(folders):
            name = f"{(parent / folder).relative_to(root).as_posix()}/"
            if is_hidden(folder):
                passed.add(name)
            elif _is_cycle(parent / folder):
                unreadable_folders.append((name, f"holds {name!r}, a link to a folder that it lies in; remove it"))
            else:
                continue
            folders.remove(folder)
        for file in files:
            name = below + file
            if not is_hidden(file) and extension_of(file) in pictures:
                names.append(name)
            else:
                passed.add(name)
    return sorted(names), unreadable_folders


def _is_cycle(folder: Path) -> bool:
    """Whether a folder is a link to one of its parents, so that following it would never end."""
    if not folder.is_symlink():
        return False
    parent, target = (os.path.join(os.path.realpath(path), "") for path in (folder.parent, folder))
    return parent.startswith(target)


def _entries_of(
    root: Path, names: list[str], key: str, options: SourceOptions, prefix: str, passed: PassedOver
) -> list[Listed]:
    """The image of a key, or why it has none; in a store of an earlier version, the first of several is the image."""
    if options.is_old:
        first, *others = names
        template = "holds {!r} and {!r}, which have the same key {!r}; rename one"
        return [
            _entry_of(root, first, key, options, prefix),
            *((plain(key), template.format(first, other, key)) for other in others),
        ]
    if not options.image_fields and len(names) > 1:
        field = names[0][len(key) + 1 :].lower()
        both = f"holds {names[0]!r} and {names[1]!r}, which have the same key {key!r}"
        return [(plain(prefix + key), f"{both}; rename one, or choose one with --image-field {field}")]
    chosen, reason = choose_picture(key, names, options, options.until("folder"))
    if reason is not None:
        return [(plain(prefix + key), reason)]
    for name in names:
        if name != names[chosen]:
            passed.add(name)
    return [_entry_of(root, names[chosen], key, options, prefix)]


def _entry_of(root: Path, name: str, key: str, options: SourceOptions, prefix: str) -> Listed:
    path = root / name
    shown = prefix + key
    reason = unfit_name(name)
    if reason:
        return plain(shown), reason
    if extension_of(name) not in options.extensions:
        return shown, f"holds {name!r}, which is not one of {', '.join(options.extensions)}; convert it"
    try:
        status = path.stat()
    except FileNotFoundError:
        return shown, f"holds {name!r}, a link to nowhere; remove it or restore its target"
    except OSError as error:
        return shown, f"holds {name!r}, which cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return shown, f"holds {name!r}, which is not a regular file; remove it"
    return ImageRecord(shown, path, 0, status.st_size, None, extension_of(name), options.max_pixels)
