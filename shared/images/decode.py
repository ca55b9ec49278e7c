"""Decoding: encoded bytes -> an upright RGB image."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import DataError
from ..sources.records import ImageRecord, read_bytes

FORMATS = ("JPEG", "PNG", "WEBP")
"""Pillow's names of the formats that are read."""
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
    except UnidentifiedImageError:
        raise DataError(f"{name} is not a JPEG, PNG or WebP image ({len(data)} bytes).") from None
    except Exception as error:  # decoders raise anything on damaged data
        raise DataError(f"{name} cannot be decoded ({str(error).rstrip('.') or type(error).__name__}).") from None


def open_image(data: bytes) -> Image.Image:
    """Opens an image by its headers; pixels are decoded on first use. Raises whatever Pillow raises."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def decode(data: bytes, name: str) -> Image.Image:
    """Decodes JPEG, PNG or WebP bytes to an RGB image, with EXIF orientation applied; of an animation the first frame.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; alpha is dropped, as in open_clip and torchvision. Raises
    DataError, which names `name`, if the bytes are not such an image or it has more pixels than Pillow allows.
    """
    with decoding(data, name):
        image = open_image(data)
        image.load()
        # ImageOps.exif_transpose would fail on EXIF that can be read but not written back.
        transpose = _TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        image = image if transpose is None else image.transpose(transpose)
        if image.mode.startswith("I"):
            # Pillow's conversion of 16-bit grey clips at 255 instead of scaling.
            image = Image.fromarray((np.asarray(image, dtype=np.uint32).clip(0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")


def upright_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) of the image that `decode` returns, from the headers alone; DataError as `decode`."""
    with decoding(data, name):
        image = open_image(data)
        width, height = image.size
        sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
        return (height, width) if sideways else (width, height)


def read_image(record: ImageRecord) -> tuple[Image.Image, bytes]:
    """Reads and decodes one image: (upright RGB, encoded bytes). Raises DataError, which names file and key."""
    data = read_bytes(record)
    return decode(data, f"{record.path}: image {record.key!r}"), data
