"""Files that are written atomically, and digests that detect any change of them."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
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
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST_WAIT_FOR_LOCK = 60.0
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
    if out.is_file() or (out.is_dir() and any(not path.name.endswith(_PARTIAL) for path in out.iterdir())):
        raise UsageError(f"{out} already exists; choose another --out or delete it.")


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
    remedy = "make room" if number in _FULL else "make it writable or choose another place"
    return DataError(f"{place} could not be written ({reason}); {remedy} and give the same command again.")


class WriteLock:
    """Keeps two processes from writing to one folder at the same time; the kernel releases it if its process dies.

    Has no effect on file systems without locks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None

    def take(self) -> None:
        """Takes the lock, unless the folder does not exist or this object holds the lock already.

        Waits up to a minute for another process to release it, then raises UsageError.
        """
        if self._file is not None or not self._folder.is_dir():
            return
        self._file = os.open(self._folder / ".lock", os.O_CREAT | os.O_WRONLY)
        deadline = time.monotonic() + _LONGEST_WAIT_FOR_LOCK
        while not _locked(self._file):
            if time.monotonic() > deadline:
                self.release()
                raise UsageError(
                    f"Another process is writing to {self._folder}; wait until it ends or choose another --out."
                )
            time.sleep(0.2)

    def release(self) -> None:
        """Releases the lock if this object holds it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


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
