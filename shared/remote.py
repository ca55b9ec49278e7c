"""Files behind URLs (http, https, s3, gs, whatever fsspec opens), with failures told in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from .errors import DataError, UsageError


def is_url(name: str | Path) -> bool:
    """Whether `name` is a URL and no local path."""
    return "://" in str(name)


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
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        protocol = url.partition(":")[0]
        raise UsageError(f"{url} needs a library that is not installed ({error}); see fsspec on {protocol}.") from None
    except (DataError, UsageError):
        raise
    except FileNotFoundError:
        raise DataError(f"{url} does not exist.") from None
    except Exception as error:  # each file system has errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{url} cannot be read ({reason}); check the address and the connection.") from None
