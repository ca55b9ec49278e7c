"""One image: where its bytes lie, and how they become an upright RGB picture."""

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from zlib_ng.zlib_ng import crc32  # zlib's, a tenth of the time

from .errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
# What makes an image of each EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """Where one image's bytes lie. `offset` and `length` are in bytes; `label` is None where there is none.

    `extension` is that of its file name, in lower case.
    """

    key: str
    path: Path
    offset: int
    length: int
    label: int | None
    extension: str = "jpg"


def keys_sha256(keys: Iterable[str]) -> str:
    """Digest of a set of images by their keys, whatever their order."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()


@lru_cache(maxsize=32)
def _descriptor(path: Path, inode: int, process: int) -> "_OpenFile":
    return _OpenFile(path)


class _OpenFile:
    """A descriptor that closes itself when the cache drops it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def read_bytes(record: ImageRecord) -> bytes:
    """The image's encoded bytes. Raises DataError if the file is gone or shorter than when it was listed."""
    try:
        # In the cache's key: the inode, as a tar may be replaced under its name; the process, as forked workers
        # must not share a descriptor's lifetime.
        descriptor = _descriptor(record.path, os.stat(record.path).st_ino, os.getpid())
        data = os.pread(descriptor.number, record.length, record.offset)
    except OSError as error:
        raise DataError(f"{record.path} cannot be read ({error.strerror}) for key {record.key!r}.") from None
    if len(data) != record.length:
        raise DataError(f"{record.path} ends inside the image of key {record.key!r}; it changed or was cut.")
    return data


def read_encoded(record: ImageRecord, expected: int, source: str | None = None) -> bytes:
    """The image's encoded bytes, if their CRC32 is the `expected` one of those that tokens were made of.

    Raises DataError, about `source` if the record lies in a copy of it, if it is not, or as `read_bytes` does.
    """
    data = read_bytes(record)
    if crc32(data) != expected:
        raise DataError(
            f"{source or record.path}: image {record.key!r} is not the one that was encoded (its CRC32 differs); "
            "give the images that the tokens were made of, or encode these."
        )
    return data


@contextmanager
def decoding(data: bytes, name: str) -> Iterator[None]:
    """A block whose failures to decode `data` become DataErrors of one sentence about `name`."""
    try:
        with warnings.catch_warnings():
            # Pillow's, about what it reads nevertheless: damaged EXIF, large images, palettes with alpha.
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name} is no JPEG, PNG or WebP image ({len(data)} bytes).") from None
    except Exception as error:  # a decoder raises whatever the bytes lead it to
        raise DataError(f"{name} cannot be decoded ({str(error).rstrip('.') or type(error).__name__}).") from None


def open_image(data: bytes) -> Image.Image:
    """The image by its headers; its pixels are decoded when they are asked for. Raises whatever Pillow raises."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def decode(data: bytes, name: str) -> Image.Image:
    """Decodes JPEG, PNG or WebP bytes to an upright RGB image, EXIF rotation applied, the first frame if animated.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; alpha is dropped, as open_clip and torchvision do.
    Raises DataError naming `name` if the bytes are not such an image, or one of more pixels than Pillow allows.
    """
    with decoding(data, name):
        image = open_image(data)
        image.load()
        # Not ImageOps.exif_transpose: it fails on EXIF that can be read but not be written back.
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith("I"):
            # Pillow's own conversion of 16-bit grey clips at 255 instead of scaling.
            image = Image.fromarray((np.asarray(image, dtype=np.uint32).clip(0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")


def upright_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) of what `decode` would give, from the headers alone; DataError as there."""
    with decoding(data, name):
        image = open_image(data)
        lies = image.getexif().get(ExifTags.Base.Orientation) in _LYING
        return image.size[::-1] if lies else image.size


def read_image(record: ImageRecord) -> tuple[Image.Image, bytes]:
    """Reads and decodes one image: (upright RGB, encoded bytes). Raises DataError naming file and key."""
    data = read_bytes(record)
    return decode(data, f"{record.path}: image {record.key!r}"), data
