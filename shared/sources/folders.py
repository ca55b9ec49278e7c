"""Folders of images: lists them in shards of up to 1,000, with the reasons why some cannot be used."""

import os
import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..errors import DataError
from ..labels.parsing import Label, label_of_name
from .keys import EXTENSIONS, OTHER_PICTURES, Skipped, extension_of, key_of, plain, unfit_name
from .records import ImageRecord

FOLDER_SHARD_IMAGES = 1000
"""Images per shard of a folder."""
Listed = ImageRecord | tuple[str, str]
"""An image, or (key, reason) for one that cannot be used."""


def list_folder(root: Path) -> list[tuple[str, tuple[Listed, ...]]]:
    """(name, images sorted by key) of each shard of a folder; DataError if it has no images or cannot be read."""
    pictures, unreadable_folders = _walk(root)
    listed: dict[str, Listed] = {folder: (plain(folder), reason) for folder, reason in unreadable_folders}
    names: dict[str, str] = {}
    duplicates: list[tuple[str, Listed]] = []
    for name in pictures:
        key = key_of(name)
        if key in names:
            reason = f"holds {names[key]!r} and {name!r}, which have the same key {key!r}; rename one"
            duplicates.append((key, (plain(key), reason)))
        else:
            names[key] = name
            listed[key] = _entry_of(root, name, key)
    if not listed:
        raise DataError(f"{root} holds neither tars nor images ({', '.join(EXTENSIONS)}).")
    labels = _class_labels(listed)
    entries = [
        (key, replace(entry, label=labels.get(key)) if isinstance(entry, ImageRecord) else entry)
        for key, entry in listed.items()
    ]
    ordered = tuple(entry for _, entry in sorted(entries + duplicates, key=lambda item: item[0]))
    return [
        (f"folder-{number:06d}", ordered[start : start + FOLDER_SHARD_IMAGES])
        for number, start in enumerate(range(0, len(ordered), FOLDER_SHARD_IMAGES))
    ]


def _walk(root: Path) -> tuple[list[str], Skipped]:
    """Names of all pictures under a folder, and (name with a slash, reason) of folders that cannot be listed."""
    names: list[str] = []
    unreadable_folders: Skipped = []

    def on_error(error: OSError) -> None:
        if Path(error.filename) == root:
            raise DataError(f"{root} cannot be read ({error.strerror}).")
        folder = f"{Path(error.filename).relative_to(root).as_posix()}/"
        unreadable_folders.append((folder, f"holds {folder!r}, a folder that cannot be listed ({error.strerror})"))

    for directory, folders, files in os.walk(root, followlinks=True, onerror=on_error):
        parent = Path(directory)
        for folder in [folder for folder in folders if _is_cycle(parent / folder)]:
            folders.remove(folder)
            name = f"{(parent / folder).relative_to(root).as_posix()}/"
            unreadable_folders.append((name, f"holds {name!r}, a link to a folder that it lies in; remove it"))
        for file in files:
            extension = file.rpartition(".")[2].lower() if "." in file else ""
            if extension in EXTENSIONS + OTHER_PICTURES and not file.startswith("."):
                names.append((parent / file).relative_to(root).as_posix())
    return sorted(names), unreadable_folders


def _is_cycle(folder: Path) -> bool:
    """Whether a folder is a link to one of its parents, so that following it would never end."""
    if not folder.is_symlink():
        return False
    parent, target = (os.path.join(os.path.realpath(path), "") for path in (folder.parent, folder))
    return parent.startswith(target)


def _entry_of(root: Path, name: str, key: str) -> Listed:
    path = root / name
    reason = unfit_name(name)
    if reason:
        return plain(key), reason
    if extension_of(name) in OTHER_PICTURES:
        return key, f"holds {name!r}, which is not one of {', '.join(EXTENSIONS)}; convert it"
    try:
        status = path.stat()
    except FileNotFoundError:
        return key, f"holds {name!r}, a link to nowhere; remove it or restore its target"
    except OSError as error:
        return key, f"holds {name!r}, which cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return key, f"holds {name!r}, which is not a regular file; remove it"
    return ImageRecord(key, path, 0, status.st_size, None, extension_of(name))


def _class_labels(keys: Iterable[str]) -> dict[str, Label]:
    """The label of every image if all of them are in class folders: its folder's name. Else none."""
    keys = list(keys)
    if not all("/" in key for key in keys):
        return {}
    return {key: label_of_name(key.split("/")[0]) for key in keys}
