"""Decoding: encoded bytes -> an upright RGB image."""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import DataError
from ..sources.records import ImageRecord, read_bytes

FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000"),
    *(("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()),
)
"""Pillow's names of the formats that are read."""
MOST_PIXELS = 178_956_970
"""The most pixels of an image unless another number is given: where Pillow stops, too."""
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each EXIF orientation upright."""
_SIDEWAYS = (5, 6, 7, 8)
"""The EXIF orientations in which width and height are swapped."""


_pillows_limit = threading.Lock()


@contextmanager
def decoding(data: bytes, name: str) -> Iterator[None]:
    """A context in which failures to decode `data` become DataErrors that name `name`."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged EXIF, large images and palettes with alpha, and reads them all the same.
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise
    except _TooLarge as error:
        raise DataError(f"{name} {error}") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is not an image of a format that is read, such as JPEG, PNG or WebP ({len(data)} bytes)."
        ) from None
    except Exception as error:  # decoders raise anything on damaged data
        raise DataError(f"{name} cannot be decoded ({str(error).rstrip('.') or type(error).__name__}).") from None


class _TooLarge(Exception):
    """An image has more pixels than it may have."""


def open_image(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Opens an image by its headers; pixels are decoded on first use. Raises whatever Pillow raises, or an exception
    that `decoding` explains if the image has more than `max_pixels` pixels (default: `MOST_PIXELS`)."""
    most = MOST_PIXELS if max_pixels is None else max_pixels
    if most <= MOST_PIXELS:
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            image = _open_any_size(data)
    else:
        image = _open_any_size(data)
    if image.width * image.height > most:
        raise _TooLarge(
            f"is {image.width}x{image.height} pixels, more than {most:,}; give a larger --max-pixels if it is a real "
            "image, or leave it out by --on-error skip."
        )
    return image


def _open_any_size(data: bytes) -> Image.Image:
    """Opens an image by its headers, however large it is; Pillow's limit is one for the whole process."""
    with _pillows_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def decode(data: bytes, name: str, max_pixels: int | None = None) -> Image.Image:
    """Decodes an image to RGB, with EXIF orientation applied; of an animation or a file of pages the first one.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; alpha is dropped, as in open_clip and torchvision. Raises
    DataError, which names `name`, if the bytes are not an image in one of `FORMATS`, if it has more than `max_pixels`
    pixels (default: `MOST_PIXELS`), or if its pixels are 32-bit floats, whose range is unknown.
    """
    with decoding(data, name):
        image = open_image(data, max_pixels)
        image.load()
        # ImageOps.exif_transpose would fail on EXIF that can be read but not written back.
        transpose = _TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        image = image if transpose is None else image.transpose(transpose)
        if image.mode == "F":
            raise ValueError("its pixels are 32-bit floats; convert them to 8 bits")
        if image.mode.startswith("I"):
            # Pillow's conversion of 16-bit grey clips at 255 instead of scaling.
            image = Image.fromarray((np.asarray(image, dtype=np.uint32).clip(0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")


def upright_size(data: bytes, name: str, max_pixels: int | None = None) -> tuple[int, int]:
    """(width, height) of the image that `decode` returns, from the headers alone; DataError as `decode`."""
    with decoding(data, name):
        image = open_image(data, max_pixels)
        width, height = image.size
        sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


def read_image(record: ImageRecord) -> tuple[Image.Image, bytes]:
    """Reads and decodes one image: (upright RGB, encoded bytes). Raises DataError, which names file and key."""
    data = read_bytes(record)
    return decode(data, f"{record.path}: image {record.key!r}", record.max_pixels), data
