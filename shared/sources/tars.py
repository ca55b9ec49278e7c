"""WebDataset tars: lists their images, with the reasons why some cannot be used."""

import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from ..labels.tar_labels import TarLabels
from .keys import EXTENSIONS, OTHER_PICTURES, Skipped, extension_of, key_of, plain, unfit_name
from .records import ImageRecord


def index_tar(path: Path, tar_labels: TarLabels | None = None) -> tuple[list[ImageRecord], Skipped]:
    """The images of a tar in its order, from headers alone, and (key, reason) of what cannot be used.

    An image whose label cannot be read has none; `tar_labels` lists the reason.
    """
    tar_labels = TarLabels(path) if tar_labels is None else tar_labels
    problems: Skipped = []
    images: dict[str, tarfile.TarInfo] = {}
    classes: dict[str, tarfile.TarInfo] = {}
    unread_pictures: dict[str, str] = {}
    for member in _members(path, problems):
        key, extension = key_of(member.name), extension_of(member.name)
        if member.name.rpartition("/")[2].startswith("."):
            continue  # such as macOS's `._a.jpg` beside `a.jpg`; WebDataset ignores them
        if extension in EXTENSIONS:
            reason = unfit_name(member.name) or _unfit_kind(member)
            if reason:
                problems.append((plain(key), reason))
            elif key in images:
                problems.append((key, f"holds key {key!r} twice; keys must be unique"))
            else:
                images[key] = member
        elif tar_labels.is_label(member, key):
            classes[key] = member
        elif extension in OTHER_PICTURES:
            unread_pictures[key] = member.name
    for key, name in unread_pictures.items():
        if key not in images:
            reason = f"holds {name!r}, which is not one of {', '.join(EXTENSIONS)}; convert it"
            problems.append((plain(key), reason))
    if not images and not problems:
        problems.append(("", f"holds no images ({', '.join(EXTENSIONS)}); give tars in WebDataset layout"))
    labels = tar_labels.read(path, classes, images)
    records = [
        ImageRecord(key, path, member.offset_data, member.size, labels.get(key), extension_of(member.name))
        for key, member in images.items()
    ]
    return records, problems


def _unfit_kind(member: tarfile.TarInfo) -> str | None:
    """Why a tar's member cannot be an image, or None."""
    if member.issym() or member.islnk():
        return f"holds {member.name!r}, a link to {member.linkname!r}; store the file itself"
    if not member.isfile() or member.issparse():
        return f"holds {member.name!r}, which is not a regular file; store it as one"
    return None


def _members(path: Path, problems: Skipped) -> Iterator[tarfile.TarInfo]:
    """The members of a tar except folders, from its headers, up to where it is truncated or damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size == 0:
                problems.append(("", "is empty (0 bytes); make or download it again"))
                return
            end = yield from _walk_headers(file, size, problems)
            if end is not None:
                _check_end(file, end, problems)
    except OSError as error:
        problems.append(("", f"cannot be read ({error.strerror or error}); make it readable"))


def _walk_headers(file: BinaryIO, size: int, problems: Skipped) -> Generator[tarfile.TarInfo, None, int | None]:
    """Yields the members; returns the byte where they end, or None after adding to `problems`."""
    previous_offset = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset <= previous_offset or member.size < 0:
                    problems.append(("", f"is damaged at byte {max(previous_offset, 0)}; make or download it again"))
                    return None
                if member.isfile() and member.offset_data + member.size > size:
                    reason = f"is truncated inside {member.name!r}; make or download it again"
                    problems.append((plain(key_of(member.name)), reason))
                    return None
                previous_offset = member.offset
                if not member.isdir():
                    yield member
            return int(tar.offset)
    except OSError:
        raise
    except Exception as error:  # tarfile raises anything on damaged headers
        reason = (str(error) or type(error).__name__).splitlines()[0]
        problems.append(("", f"is not a readable tar ({reason}); give an uncompressed, whole tar"))
        return None


def _check_end(file: BinaryIO, end: int, problems: Skipped) -> None:
    """Checks that a tar ends with blocks of zeros; tarfile takes a truncated or damaged header for the end as well."""
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        problems.append(("", f"is truncated or damaged at byte {end}; make or download it again"))
        return
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            problems.append(
                ("", f"goes on after its end at byte {end}, as two tars in one file do; pack its files anew")
            )
            return
