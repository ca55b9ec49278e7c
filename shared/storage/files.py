"""Files that appear whole or not at all, and digests that prove what is in them."""

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
from typing import Any

from safetensors import SafetensorError
from upath import UPath

from ..errors import DataError, UsageError
from .remote import explained, is_remote, read_whole, uploaded_whole

_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST_WAIT_FOR_LOCK = 60.0
SEAL = "sha256_of_the_rest"


def canonical_json(value: Any) -> str:
    """The one spelling of `value` that is hashed: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_file(path: Path | UPath) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with explained(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(out: Path) -> None:
    """UsageError if something lies at `out` already; an empty folder may, and what a killed process left."""
    if out.is_file() or (out.is_dir() and any(not path.name.endswith(_PARTIAL) for path in out.iterdir())):
        raise UsageError(f"{out} already exists; choose another --out or delete it.")


@contextmanager
def written_whole(path: Path | UPath) -> Iterator[Path]:
    """Yields a hidden path to write a file or folder at; it takes its final name, synced, only if the block succeeds.

    The hidden name is fixed, so that what a killed process left behind is overwritten by the next one. Raises
    DataError if the disk is full or `path` cannot be written for another reason. A remote file is written on this
    disk and then put in its place as a whole.
    """
    if is_remote(path):
        with uploaded_whole(path) as partial:
            yield partial
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
            with suppress(OSError):  # a disk that cannot be written must not hide why
                _remove(partial)
            raise


@contextmanager
def _explained(path: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise _not_written(path, int(number[1]) if number else 0, str(error)) from None
    except OSError as error:
        # An error about another file, such as one that was read to write this one, speaks for itself.
        about = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else partial
        if isinstance(error, ConnectionError) or not (
            about in (path, *path.parents) or partial in (about, *about.parents)
        ):
            raise
        raise _not_written(path, error.errno or 0, str(error)) from None


def _not_written(path: Path, number: int, text: str) -> DataError:
    def shown(name: str) -> str:
        while name.startswith(".") and name.endswith(_PARTIAL):
            name = name[1:].removesuffix(_PARTIAL)
        return name

    place = Path(*map(shown, path.parts))  # one that is written whole may lie in another one
    reason = os.strerror(number) if number else text
    remedy = "make room" if number in _FULL else "make it writable or choose another place"
    return DataError(f"{place} could not be written ({reason}); {remedy} and give the same command again.")


class WriteLock:
    """Keeps two processes from writing to one folder at the same time; the kernel lets go when its holder dies.

    Where the file system knows no locks, nobody is kept out.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: int | None = None

    def take(self) -> None:
        """Takes the lock, if the folder exists and it is not held yet.

        Waits a minute for a process that is just ending, then raises UsageError.
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
    """Writes `content` readably, with a digest of itself, so that any later change of a byte can be seen."""
    with written_whole(path) as partial:
        partial.write_text(_sealed_text(content), encoding="utf-8")


def read_sealed_json(path: Path | UPath, *, format: str, version: int) -> dict[str, Any]:
    """Reads what `write_sealed_json` wrote.

    Raises DataError if the file is missing, was changed, or is of another format or version than asked for.
    """
    try:
        text = read_whole(path).decode("utf-8")
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
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
    except ValueError:  # what JSON can say and we never write: infinities, halves of surrogate pairs
        unchanged = False
    if not unchanged:
        raise DataError(
            f"{path} was changed since it was written (its digest does not match); restore it or make it again."
        )
    return content
