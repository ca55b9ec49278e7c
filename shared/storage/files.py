"""Files that are written atomically, and digests that detect any change of them."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from upath import UPath

from ..errors import DataError, UsageError
from .bounded import MOST_JSON_BYTES, read_bounded
from .remote import explained, is_remote, uploaded_whole

if TYPE_CHECKING:
    from io import BufferedReader

_PARTIAL = ".partial"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable or choose another place"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT), "choose another place"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "choose another place"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    errno.EIO: "check the disk",
    errno.ESTALE: "check the file server",
}
_TOO_DEEP = "\n" + " " * 32
"""How a line begins, in sealed JSON, that is nested 32 levels deep; a newline inside a text is escaped."""
SEAL = "sha256_of_the_rest"
"""The field of a sealed JSON file that has the digest of all other fields."""


def canonical_json(value: Any) -> str:
    """`value` as JSON for hashing: sorted keys, no spaces, no escapes. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_file(path: Path | UPath) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with explained(path), path.open("rb") as file:
        return hashlib.file_digest(cast("BufferedReader", file), "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(out: Path) -> None:
    """UsageError if `out` exists already; an empty folder is allowed, and so are partial files of a killed process."""
    if out.is_file() or not is_empty(out):
        raise UsageError(f"{out} already exists; choose another --out or delete it.")


def refuse_folder(file: Path, option: str, example: str) -> None:
    """UsageError if `file`, the value of `option`, is a folder; the message proposes the file `example` in it."""
    if file.is_dir():
        raise UsageError(f"{option} {file} is a folder; give a file, such as {file / example}.")


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but partial files of a killed process and lock files, or does not exist."""
    return not folder.is_dir() or all(
        path.name.endswith(_PARTIAL) or path.name.startswith((".lock", "..lock")) for path in folder.iterdir()
    )


@contextmanager
def written_whole(path: Path | UPath) -> Iterator[Path]:
    """Writes a file or folder atomically: yields a hidden path beside it, renamed to `path` if the block succeeds.

    Everything is synced to disk before the rename. The hidden name is always the same, so the next process overwrites
    what a killed one left. A remote file is written on this disk and then uploaded at once. Raises DataError if the
    disk is full or `path` cannot be written for another reason.
    """
    if is_remote(path):
        with uploaded_whole(path) as local:
            yield local
        return
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    with _explained(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        try:
            yield partial
            for file in (p for p in partial.rglob("*") if p.is_file()) if partial.is_dir() else [partial]:
                _fsync(file)
            os.replace(partial, path)
            _fsync(path.parent)
        except BaseException:
            with suppress(OSError):  # a second failure must not hide the first
                _remove(partial)
            raise


@contextmanager
def _explained(path: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"(?:os error|code:) (\d+)", str(error))  # newer and older releases
        raise _not_written(path, int(number[1]) if number else 0, str(error)) from None
    except OSError as error:
        # Errors about other files, such as one that is read in the block, are left alone.
        failed = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else partial
        if isinstance(error, ConnectionError) or not (
            failed in (path, *path.parents) or partial in (failed, *failed.parents)
        ):
            raise
        raise _not_written(path, error.errno or 0, str(error)) from None


def _not_written(path: Path, number: int, text: str) -> DataError:
    def final_name(name: str) -> str:
        while name.startswith(".") and name.endswith(_PARTIAL):
            name = name[1:].removesuffix(_PARTIAL)
        return name

    place = Path(*map(final_name, path.parts))  # a folder above may be partial as well
    reason = os.strerror(number) if number else text
    return not_written(place, number, reason)


def not_written(place: Path | UPath, number: int, reason: str) -> DataError:
    """The error for a file or folder that could not be written, with what to do about that error number."""
    remedy = _REMEDIES.get(number, "see to that or choose another place")
    return DataError(f"{place} could not be written ({reason}); {remedy} and give the same command again.")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sealed_text(content: dict[str, Any]) -> str:
    seal = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return json.dumps({**content, SEAL: seal}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_sealed_json(path: Path | UPath, content: dict[str, Any]) -> None:
    """Writes `content` as indented JSON with a digest of itself, so that any later change of a byte is detected."""
    with written_whole(path) as partial:
        partial.write_text(_sealed_text(content), encoding="utf-8")


def read_sealed_json(path: Path | UPath, *, format: str, version: int) -> dict[str, Any]:
    """Reads a file that `write_sealed_json` wrote.

    Raises DataError if it is missing, was changed, or has another format or version than the given ones.
    """
    try:
        text = read_bounded(path, MOST_JSON_BYTES).decode("utf-8")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); restore it or make it again.") from None
    if content.get("format") != format:
        raise DataError(f"{path} is not a {format}: it says format {content.get('format')!r}.")
    if content.get("version") != version:
        raise DataError(
            f"{path} has {format} version {content.get('version')!r}, and this mapet reads version {version}; "
            "use the mapet that wrote it or make it again."
        )
    content.pop(SEAL, None)
    try:
        unchanged = _sealed_text(content) == text
    except (ValueError, RecursionError):  # JSON that `write_sealed_json` never writes: infinities, lone surrogates
        unchanged = False
    if not unchanged:
        raise DataError(
            f"{path} was changed since it was written (its digest does not match); restore it or make it again."
        )
    if _TOO_DEEP in text:
        raise DataError(f"{path} has values nested deeper than any that mapet writes; restore it or make it again.")
    return content
