"""Files behind URLs (http, https, s3, gs, whatever fsspec opens), with failures told in one sentence."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import fsspec
from upath import UPath

from ..errors import DataError, UsageError

# What pip calls the library behind a protocol, where fsspec does not carry it itself.
_LIBRARIES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
    "ssh": "paramiko",
}


class _Missing(DataError):
    """There is nothing at a URL."""


def is_url(name: str | Path) -> bool:
    """Whether `name` is the URL of something remote: no local path, no file:// URL."""
    return "://" in str(name) and not str(name).startswith("file://")


def as_path(place: str | Path | UPath) -> Path | UPath:
    """A local path as a `Path`, a URL as a `UPath`, which is used alike.

    Raises UsageError if the URL's protocol is unknown or its library is not installed.
    """
    if not is_url(place):
        return Path(str(place).removeprefix("file://"))
    with _explained(str(place)):
        path = UPath(place)
        # Other processes may have written since a folder was listed.
        path.fs.invalidate_cache()
    return path


def is_remote(path: Path | UPath) -> bool:
    """Whether a path that `as_path` gave is behind a URL."""
    return isinstance(path, UPath)


def explained(path: Path | UPath):
    """A block whose failures at a remote `path` become DataErrors of one sentence; a local one's are left alone."""
    return _explained(str(path)) if is_remote(path) else nullcontext()


def exists(path: Path | UPath) -> bool:
    """Whether a file or folder is there; DataError if its server cannot be asked."""
    if not is_remote(path):
        return path.exists()
    try:
        with _explained(str(path)):
            path.fs.info(path.path)  # `exists` would answer no where the server cannot be reached
    except _Missing:
        return False
    return True


def file_size(path: Path | UPath) -> int:
    """Bytes of a file; DataError if a remote one is missing or its server cannot be asked."""
    with explained(path):
        return path.stat().st_size


def read_whole(path: Path | UPath) -> bytes:
    """A file's bytes, a remote one's by one GET; DataError if a remote file is missing or cannot be read."""
    if not is_remote(path):
        return path.read_bytes()
    with explained(path):
        return path.fs.cat_file(path.path)


@contextmanager
def on_this_disk(path: Path | UPath) -> Iterator[Path]:
    """The file itself, or a copy of a remote one for the time of the block."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        copy = Path(folder, path.name)
        download(str(path), copy)
        yield copy


@contextmanager
def uploaded_whole(path: UPath) -> Iterator[Path]:
    """Yields a local path to write a file at; if the block succeeds, it goes to the remote `path` by one PUT."""
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        partial = Path(folder, path.name)
        yield partial
        with _explained(str(path), "written"):
            try:
                path.fs.put_file(str(partial), path.path)
            except FileNotFoundError:  # unlike an object store, it has folders
                path.fs.makedirs(path.parent.path, exist_ok=True)
                path.fs.put_file(str(partial), path.path)


def download(url: str, path: Path) -> None:
    """Copies a remote file to `path`; DataError if it cannot be had or arrives short."""
    with _explained(url):
        fs, name = fsspec.core.url_to_fs(url)
        fs.get_file(name, str(path))
        stated = fs.info(name).get("size")
    if stated is not None and stated != path.stat().st_size:
        raise DataError(f"{url} arrived with {path.stat().st_size} of {stated} bytes; give the same command again.")


def remote_size(url: str) -> int | None:
    """Bytes of a remote file; None if the server does not say."""
    with _explained(url):
        fs, name = fsspec.core.url_to_fs(url)
        return fs.info(name).get("size")


def list_tars(url: str) -> list[str]:
    """URLs of the tars of a remote folder, sorted; DataError if there are none."""
    with _explained(url):
        fs, name = fsspec.core.url_to_fs(url)
        tars = sorted(fs.unstrip_protocol(path) for path in fs.glob(f"{name.rstrip('/')}/*.tar"))
    if not tars:
        raise DataError(f"{url} holds no tars; give the URL of a tar, a brace pattern or a folder of tars.")
    return tars


@contextmanager
def _explained(url: str, done: str = "read") -> Iterator[None]:
    protocol = url.partition(":")[0]
    try:
        yield
    except (DataError, UsageError):
        raise
    except ImportError as error:
        library = _LIBRARIES.get(protocol)
        remedy = f"pip install {library}" if library else f"{error}; see fsspec on {protocol}"
        raise UsageError(f"{url} needs a library that is not installed: {remedy}.") from None
    except Exception as error:  # each file system has errors of its own
        while isinstance(error, FileNotFoundError) and error.__cause__:  # fsspec says so of all that fails with HTTP
            error = error.__cause__
        if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404:
            raise _Missing(f"{url} does not exist.") from None
        if protocol not in fsspec.available_protocols():
            raise UsageError(f"{url} begins with {protocol}://, which fsspec does not know; check the URL.") from None
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{url} cannot be {done} ({reason}); check the address and the connection.") from None
