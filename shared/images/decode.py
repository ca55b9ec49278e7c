"""Decoding: encoded bytes -> an upright RGB image."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import DataError
from .records import ImageRecord, read_bytes

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
