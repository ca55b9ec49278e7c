"""Files at URLs (http, https, s3, gs and all that fsspec opens), whose failures become errors of one sentence."""

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import fsspec
from upath import UPath

from ..errors import DataError, UsageError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

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
"""The package to install for a protocol that fsspec does not support by itself."""


_SILENCE = 60.0
"""Seconds without a byte after which an HTTP server is taken to be gone."""
_PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try of a transfer; bytes that arrive begin the count anew."""
_TRANSIENT = (408, 416, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone at the next try."""


class _Missing(DataError):
    """There is no file at a URL."""


def is_url(name: str | Path | UPath) -> bool:
    """Whether `name` is a URL of a remote file or folder: neither a local path nor a file:// URL."""
    return "://" in str(name) and not str(name).startswith("file://")


_QUERY = re.compile(r"(\w+://[^\s?'\"<>]+)\?[^\s'\"<>)]*")
_PASSWORD = re.compile(r"(\w+://)[^\s/@'\"]+@")


def without_query(text: str) -> str:
    """A URL, or a text with URLs in it, without their queries and passwords, which may give access to a bucket."""
    return _PASSWORD.sub(r"\1", _QUERY.sub(r"\1", text))


def as_path(place: str | Path | UPath) -> Path | UPath:
    """A local path or file:// URL as a `Path`, any other URL as a `UPath`, which has the same methods.

    Raises UsageError if the URL's protocol is unknown or its library is not installed.
    """
    if not is_url(place):
        return Path(str(place).removeprefix("file://"))
    with _explained(str(place)):
        path: UPath = UPath(place, **_options(str(place)))
        # Other processes may have written since fsspec listed a folder.
        path.fs.invalidate_cache()
    return path


def is_remote(path: Path | UPath) -> "TypeIs[UPath]":
    """Whether a path that `as_path` returned is at a URL."""
    return isinstance(path, UPath)


def explained(path: Path | UPath) -> AbstractContextManager[None]:
    """A context in which failures at a remote `path` become DataErrors; at a local path it changes nothing."""
    return _explained(str(path)) if is_remote(path) else nullcontext()


def exists(path: Path | UPath) -> bool:
    """Whether a file or folder exists; DataError if its server cannot be reached."""
    if not is_remote(path):
        return path.exists()
    try:
        with _explained(str(path)):
            path.fs.info(path.path)  # `exists` would return False if the server cannot be reached
    except _Missing:
        return False
    return True


def file_size(path: Path | UPath) -> int:
    """Bytes of a file; DataError if a remote one is missing or cannot be reached."""
    with explained(path):
        return int(path.stat().st_size)


def read_whole(path: Path | UPath) -> bytes:
    """The bytes of a file, of a remote one by one GET; DataError if a remote file is missing or cannot be read."""
    if not is_remote(path):
        return path.read_bytes()
    with explained(path):
        content: bytes = path.fs.cat_file(path.path)
        return content


@contextmanager
def on_this_disk(path: Path | UPath) -> Iterator[Path]:
    """Yields a local path of the file: itself, or for the time of the block a copy of a remote file."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        copy = Path(folder, path.name)
        download(str(path), copy)
        yield copy


@contextmanager
def uploaded_whole(path: UPath) -> Iterator[Path]:
    """Yields a local path to write a file at, which is uploaded to `path` by one PUT if the block succeeds."""
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        partial = Path(folder, path.name)
        yield partial
        with _explained(str(path), "written"):
            try:
                path.fs.put_file(str(partial), path.path)
            except FileNotFoundError:  # this file system, unlike an object store, has folders
                path.fs.makedirs(path.parent.path, exist_ok=True)
                path.fs.put_file(str(partial), path.path)


def _options(url: str) -> dict[str, Any]:
    """fsspec's options for a URL. aiohttp ends a transfer after 300 s in all by default, even while bytes flow."""
    protocol = url.partition("://")[0]
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
    configured = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    return {"client_kwargs": {"timeout": timeout, **configured}}


def _file_system(url: str) -> tuple[Any, str]:
    fs, name = fsspec.core.url_to_fs(url, **_options(url))
    return fs, name


def download(url: str, path: Path) -> None:
    """Copies a remote file to `path`; DataError if it cannot be read or arrives incomplete.

    An HTTP transfer that breaks off, or brings no byte for 60 s, goes on where it stopped (a Range request) if the
    server still has the same file, and begins again otherwise.
    """
    with _explained(url):
        fs, name = _file_system(url)
        if url.startswith(("http://", "https://")):
            with open(path, "wb") as file:
                _HttpTransfer(fs, name, file).run()
            return
        fs.get_file(name, str(path))
        stated = fs.info(name).get("size")
    if stated is not None and stated != path.stat().st_size:
        shown = without_query(url)
        raise DataError(f"{shown} arrived with {path.stat().st_size} of {stated} bytes; give the same command again.")


class _HttpTransfer:
    """One file from an HTTP server, in as many requests as it takes."""

    def __init__(self, fs: Any, url: str, file: BinaryIO) -> None:
        self.fs, self.url, self.file = fs, url, file
        self.version: str | None = None
        """The ETag or date of the file whose first bytes have arrived; without one, they are requested again."""

    def run(self) -> None:
        """Raises what the last try raised, if no try brings a byte, or at once what another try would not change."""
        failures = 0
        while True:
            arrived = self.file.tell()
            try:
                fsspec.asyn.sync(self.fs.loop, self._request)
                return
            except Exception as error:
                status = getattr(error, "status", None)
                if status and status not in _TRANSIENT:
                    raise
                if _is_of_this_disk(error):
                    raise DataError(
                        f"{without_query(self.url)} could not be stored in {Path(self.file.name).parent} ({error}); "
                        "make room there."
                    ) from None
                failures = 1 if self.file.tell() > arrived else failures + 1
                if failures > len(_PAUSES):
                    raise
                time.sleep(_PAUSES[failures - 1])

    async def _request(self) -> None:
        settings = dict(self.fs.kwargs)
        headers = {**settings.pop("headers", {}), "Accept-Encoding": "identity"}
        if self.file.tell() and self.version:
            headers |= {"Range": f"bytes={self.file.tell()}-", "If-Range": self.version}
        session = await self.fs.set_session()
        async with session.get(self.fs.encode_url(self.url), headers=headers, **settings) as response:
            if response.status == 416:  # the file is another one now
                self.version = None
            response.raise_for_status()
            begins = f"bytes {self.file.tell()}-"
            if not (response.status == 206 and response.headers.get("Content-Range", "").startswith(begins)):
                self.file.seek(0)
                self.file.truncate()
                tag = response.headers.get("ETag", "")
                # A weak tag does not promise equal bytes.
                self.version = (tag if not tag.startswith("W/") else "") or response.headers.get("Last-Modified")
            async for block in response.content.iter_chunked(1 << 20):
                self.file.write(block)


def _is_of_this_disk(error: Exception) -> bool:
    from aiohttp import ClientError

    return isinstance(error, OSError) and not isinstance(error, ClientError | ConnectionError | TimeoutError)


def remote_size(url: str) -> int | None:
    """Bytes of a remote file; None if the server does not tell, DataError if it cannot be reached."""
    with _explained(url):
        fs, name = _file_system(url)
        size: int | None = fs.info(name).get("size")
    return size


def list_tars(url: str) -> list[str]:
    """URLs of the tars of a remote folder, sorted; DataError if there are none."""
    with _explained(url):
        tars = _glob(f"{url.rstrip('/')}/*.tar")
    if not tars:
        raise DataError(
            f"{without_query(url)} holds no tars; give the URL of a tar, a brace pattern or a folder of tars."
        )
    return tars


def glob_urls(pattern: str) -> list[str]:
    """URLs that a pattern with `*`, `?` or `[...]` matches, sorted; DataError if there are none."""
    with _explained(pattern):
        urls = _glob(pattern)
    if not urls:
        raise DataError(f"{pattern} matches nothing; check the pattern.")
    return urls


def _glob(pattern: str) -> list[str]:
    fs, name = _file_system(pattern)
    return sorted(fs.unstrip_protocol(path) for path in fs.glob(name))


@contextmanager
def _explained(url: str, done: str = "read") -> Iterator[None]:
    protocol, shown = url.partition(":")[0], without_query(url)
    try:
        yield
    except (DataError, UsageError):
        raise
    except ImportError as error:
        library = _LIBRARIES.get(protocol)
        remedy = f"pip install {library}" if library else f"{error}; see fsspec on {protocol}"
        raise UsageError(f"{shown} needs a library that is not installed: {remedy}.") from None
    except Exception as error:  # each file system has errors of its own
        cause: BaseException = error
        while isinstance(cause, FileNotFoundError) and cause.__cause__:  # fsspec's, for every failure of HTTP
            cause = cause.__cause__
        if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise _Missing(f"{shown} does not exist.") from None
        if protocol not in fsspec.available_protocols():
            raise UsageError(f"{shown} begins with {protocol}://, which fsspec does not know; check the URL.") from None
        reason = without_query((str(cause) or type(cause).__name__).splitlines()[0]).rstrip(".")
        raise DataError(f"{shown} cannot be {done} ({reason}); check the address and the connection.") from None
