"""IMAGES as they are typed -> tars and folders: braces, globs, `~`, `$VAR`, `a::b`, URLs."""

import errno
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import braceexpand
import fsspec

from ..errors import DataError, UsageError
from ..runtime.console import say
from ..storage.compressed import is_tar_name
from ..storage.remote import as_path, glob_urls, is_url, without_query
from .keys import EXTENSIONS, OTHER_PICTURES, extension_of, is_hidden
from .passed import PassedOver, count_of, first_to_last

Place = Path | str
"""A local tar or folder, or a URL as text."""


def expand(images: str | Path | Sequence[str | Path], skip: bool = False) -> list[Place]:
    """The places that IMAGES names, in order.

    A path that exists is taken as it is, whatever characters its name has. In all others `~` and `$VAR` are replaced,
    `a::b` is split, and braces (`{000..015}`, `{0..10..2}`, `{a,b}`) and globs are expanded. Tars that a range names
    and that do not exist are left out with `skip`.

    Raises UsageError for an invalid pattern or a file that is an image, DataError for a place that does not exist.
    """
    given = [images] if isinstance(images, str | Path) else list(images)
    if not given or not all(str(one) for one in given):
        raise UsageError("No images were given; name a tar, a folder or a brace pattern.")
    places = [place for one in given for part in _parts(str(one)) for place in _places(part, skip)]
    for place in places:
        extension = extension_of(place.name) if isinstance(place, Path) else ""
        if extension in (*EXTENSIONS, *OTHER_PICTURES) and isinstance(place, Path) and not place.is_dir():
            raise UsageError(f"{place} is a single image; give the folder that holds it.")
    return list(dict.fromkeys(places))


def _parts(text: str) -> list[str]:
    """Both sides of `a::b`, which joins sources in WebDataset; in fsspec it chains protocols (`simplecache::s3://..`)."""
    parts = text.split("::")
    if (
        len(parts) == 1
        or "://[" in text
        or _exists(Path(text))
        or any(part in fsspec.available_protocols() for part in parts)
    ):
        return [text]
    if not all(parts):
        raise UsageError(f"IMAGES {without_query(text)} has nothing on one side of '::'; give a source on each.")
    return parts


def _places(text: str, skip: bool) -> list[Place]:
    if is_url(text):
        return list(_urls(text))
    text = str(as_path(text))
    for spelled in dict.fromkeys([text, os.path.expandvars(os.path.expanduser(text))]):
        if _exists(Path(spelled)):
            return [Path(spelled)]
    base, rest = _existing_part(spelled)
    names = [f"{base}{name}" for name in _braces(rest, spelled)]
    paths = [path for name in names for path in _matches(name, base)]
    missing = [path for path in paths if not _exists(path)]
    if missing:
        _account_for(missing, paths, spelled, skip)
    return [path for path in paths if _exists(path)] if missing else list(paths)


def _urls(pattern: str) -> Iterator[str]:
    address, mark, query = pattern.partition("?")
    for url in _braces(address, address):
        if glob.has_magic(url.partition("://")[2].partition("/")[2]):  # not in a host such as [::1]
            yield from glob_urls(url)
        else:
            yield f"{url}{mark}{query}"


def _braces(text: str, pattern: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(text))
    except ValueError as error:
        raise UsageError(f"IMAGES {pattern} is not a valid pattern such as train-{{000..015}}.tar ({error}).") from None


def _existing_part(text: str) -> tuple[str, str]:
    """The longest leading folder of a path that exists, so that braces in its name are no pattern, and the rest."""
    parts = text.split("/")
    for count in range(len(parts) - 1, 0, -1):
        base = "/".join(parts[:count]) + "/"
        if any(character in base for character in "{}*?[") and os.path.isdir(base):
            return base, "/".join(parts[count:])
    return "", text


def _matches(name: str, base: str) -> list[Path]:
    """The paths that a name with wildcards matches; the path itself if it has none."""
    rest = name.removeprefix(base)
    if _exists(Path(name)) or not glob.has_magic(rest):
        return [Path(name)]
    passed = PassedOver()
    paths = []
    for match in sorted(glob.glob(glob.escape(base) + rest, recursive=True)):
        if is_hidden(match.removeprefix(base).lstrip("/")) and not is_hidden(rest.lstrip("/")):
            passed.add(match)
        elif is_tar_name(match) or os.path.isdir(match) or extension_of(match) in EXTENSIONS:
            paths.append(Path(match))
        else:
            passed.add(match)
    if passed:
        say(f"{name}: passed over {passed}.")
    if not paths:
        raise DataError(f"{name} matches no tars and no folders; check the pattern.")
    return paths


def _account_for(missing: Sequence[Path], paths: Sequence[Path], pattern: str, skip: bool) -> None:
    """Says which tars of a range do not exist. Raises DataError unless they may be skipped and others exist."""
    if len(paths) == 1:
        variable = next((part for part in str(paths[0]).split("/") if part.startswith("$")), None)
        hint = f"; the environment has no {variable}" if variable else ""
        raise DataError(f"{paths[0]} does not exist{hint}; IMAGES takes a tar, a folder or a brace pattern of tars.")
    if skip and len(missing) < len(paths):
        names = first_to_last(str(path) for path in missing)
        say(f"{pattern}: {count_of(len(missing), 'tar')} of {len(paths):,} do not exist and are left out: {names}.")
        return
    advice = "check the pattern" if len(missing) == len(paths) else "restore them, or leave them out by --on-error skip"
    if len(missing) == 1:
        raise DataError(f"{missing[0]} does not exist; {advice}.")
    raise DataError(
        f"{missing[0]} and {len(missing) - 1} more of the {len(paths)} of {pattern} do not exist; {advice}."
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):  # a pattern longer than a name may be
            return False
        raise DataError(f"{path} cannot be read ({error.strerror}).") from None
    except ValueError:  # a zero byte
        return False
