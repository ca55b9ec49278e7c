"""WebDataset tars: lists their images, with the reasons why some cannot be used."""

import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..labels.parsing import Label
from ..labels.tar_labels import TarLabels
from .keys import (
    EXTENSIONS,
    FIRST_DOT,
    FIRST_EXTENSIONS,
    LAST_DOT,
    OTHER_PICTURES,
    Skipped,
    extension_of,
    is_hidden,
    key_of,
    plain,
    unfit_name,
)
from .options import DEFAULT, SourceOptions
from .passed import PassedOver
from .records import ImageRecord


@dataclass(frozen=True)
class Region:
    """A tar inside another one: `length` bytes from `offset` in the outer tar."""

    name: str
    offset: int
    length: int


@dataclass
class _Members:
    """The members of a tar by key."""

    pictures: dict[str, list[tarfile.TarInfo]] = field(default_factory=dict)
    classes: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    unread_pictures: dict[str, str] = field(default_factory=dict)
    tars: list[str] = field(default_factory=list)


def index_tar(
    path: Path,
    options: SourceOptions = DEFAULT,
    *,
    region: Region | None = None,
    prefix: str = "",
    tar_labels: TarLabels | None = None,
    label: Label | None = None,
    passed: PassedOver | None = None,
) -> tuple[list[ImageRecord], Skipped]:
    """The images of a tar in its order, from headers alone, and (key, reason) of what cannot be used.

    Args:
        path: The tar.
        options: Where keys end, and which pictures are images.
        region: Reads the tar that is there in `path`, instead of `path` itself; offsets count from the start of `path`.
        prefix: What every key begins with.
        tar_labels: Reads the labels, and lists those that cannot be read, whose images have none (default: those of
            `.cls` members).
        label: The label of images that have none of their own.
        passed: Counts the members that are passed over.
    """
    problems: Skipped = []
    passed = PassedOver() if passed is None else passed
    tar_labels = TarLabels(path) if tar_labels is None else tar_labels
    members = _sort_members(path, options, region, tar_labels, problems, passed)
    images: dict[str, tarfile.TarInfo] = {}
    for key, pictures in members.pictures.items():
        chosen, reason = choose_picture(key, [member.name for member in pictures], options, options.until("tar"))
        member = pictures[chosen]
        reason = unfit_name(member.name) or reason or _unfit_kind(member)
        if reason:
            problems.append((plain(key), reason))
            continue
        images[key] = member
        for other in pictures:
            if other is not member:
                passed.add(other.name)
    for key, name in members.unread_pictures.items():
        if key not in members.pictures:
            reason = f"holds {name!r}, which is not one of {', '.join(EXTENSIONS)}; convert it"
            problems.append((plain(key), reason))
    if members.tars:
        beside = "beside images; pack them into tars of their own" if images else "not images; give it alone"
        problems.append(("", f"holds tars such as {members.tars[0]!r}, {beside}"))
    elif not images and not problems:
        problems.append(("", f"holds no images ({', '.join(EXTENSIONS)}); give tars in WebDataset layout"))
    labels = tar_labels.read(path, members.classes, images)
    records = [
        ImageRecord(
            prefix + key,
            path,
            member.offset_data,
            member.size,
            labels.get(key, label),
            extension_of(member.name),
            options.max_pixels,
        )
        for key, member in images.items()
    ]
    return records, [(prefix + key if key else key, reason) for key, reason in problems]


def nested_tars(path: Path) -> list[Region]:
    """The tars that a tar of tars holds, such as ImageNet's; empty for any other file."""
    regions: list[Region] = []
    problems: Skipped = []
    for member in _members(path, problems):
        if not is_hidden(member.name) and extension_of(member.name) in EXTENSIONS:
            return []  # a tar of images: its first headers are enough
        if is_hidden(member.name) or not member.isfile() or extension_of(member.name) != "tar":
            continue
        regions.append(Region(member.name, member.offset_data, member.size))
    return [] if problems else regions


def choose_picture(key: str, names: list[str], options: SourceOptions, until: str) -> tuple[int, str | None]:
    """The index of the name that is the image of a key, and the reason why none of several is."""
    fields = [name[len(key) + 1 :].lower() for name in names]
    if options.image_fields:
        chosen = [at for at, name in enumerate(fields) if name in options.image_fields]
        if not chosen:
            others = ", ".join(map(repr, names[:3]))
            return 0, f"holds {others} and nothing of --image-field {options.image_field} under the key {key!r}"
    else:
        chosen = list(range(len(names)))
        first = [at for at in chosen if extension_of(names[at]) in FIRST_EXTENSIONS]
        chosen = first if len(first) == 1 else chosen
    if len(chosen) == 1:
        return chosen[0], None
    if len({names[at] for at in chosen}) == 1:
        return chosen[0], f"holds key {key!r} twice; keys must be unique"
    examples = " and ".join(repr(names[at]) for at in chosen[:2])
    advice = f"choose one with --image-field {fields[chosen[0]]}"
    if until == FIRST_DOT and len({key_of(names[at], LAST_DOT) for at in chosen}) == len(chosen):
        advice = f"keys end at the first dot: give --key-until last-dot, or {advice}"
    return chosen[0], f"holds {examples}, which have the same key {key!r}; {advice}"


def _sort_members(
    path: Path,
    options: SourceOptions,
    region: Region | None,
    tar_labels: TarLabels,
    problems: Skipped,
    passed: PassedOver,
) -> _Members:
    members, until, extensions = _Members(), options.until("tar"), frozenset(options.extensions)
    for member in _members(path, problems, region, until):
        name = member.name
        if is_hidden(name):
            passed.add(name)  # such as macOS's `._a.jpg` beside `a.jpg`; WebDataset ignores them
            continue
        key, extension = key_of(name, until), extension_of(name)
        if extension in extensions:
            members.pictures.setdefault(key, []).append(member)
        elif tar_labels.is_label(member, key):
            members.classes[key] = member
        elif extension in OTHER_PICTURES:
            members.unread_pictures[key] = name
        else:
            if extension == "tar":
                members.tars.append(name)
            passed.add(name, extension)
    return members


def _unfit_kind(member: tarfile.TarInfo) -> str | None:
    """Why a tar's member cannot be an image, or None."""
    if member.issym() or member.islnk():
        return f"holds {member.name!r}, a link to {member.linkname!r}; store the file itself"
    if not member.isfile() or member.issparse():
        return f"holds {member.name!r}, which is not a regular file; store it as one"
    return None


def _members(
    path: Path, problems: Skipped, region: Region | None = None, until: str = FIRST_DOT
) -> Iterator[tarfile.TarInfo]:
    """The members of a tar except folders, from its headers, up to where it is truncated or damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if region is not None:
                size = region.offset + region.length
                file.seek(region.offset)
            if size == file.tell():
                problems.append(("", "is empty (0 bytes); make or download it again"))
                return
            end = yield from _walk_headers(file, size, problems, until)
            if end is not None:
                _check_end(file, end, size, problems)
    except OSError as error:
        problems.append(("", f"cannot be read ({error.strerror or error}); make it readable"))


def _walk_headers(
    file: BinaryIO, size: int, problems: Skipped, until: str
) -> Generator[tarfile.TarInfo, None, int | None]:
    """Yields the members up to byte `size`; returns the byte where they end, or None after adding to `problems`."""
    previous_offset = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset <= previous_offset or member.size < 0:
                    problems.append(("", f"is damaged at byte {max(previous_offset, 0)}; make or download it again"))
                    return None
                if member.isfile() and member.offset_data + member.size > size:
                    reason = f"is truncated inside {member.name!r}; make or download it again"
                    problems.append((plain(key_of(member.name, until)), reason))
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


def _check_end(file: BinaryIO, end: int, size: int, problems: Skipped) -> None:
    """Checks that a tar ends with blocks of zeros; tarfile takes a truncated or damaged header for the end as well."""
    file.seek(end)
    if end + tarfile.BLOCKSIZE > size or file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        problems.append(("", f"is truncated or damaged at byte {end}; make or download it again"))
        return
    while block := file.read(min(1 << 20, max(size - file.tell(), 0))):
        if block.strip(b"\0"):
            problems.append(
                ("", f"goes on after its end at byte {end}, as two tars in one file do; pack its files anew")
            )
            return
