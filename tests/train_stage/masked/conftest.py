"""Fixtures of the tests of segmentation."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.sources.records import ImageRecord
from PIL import Image


def _png(values: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(values)
    (image if mode is None else image.convert(mode)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """png(array, mode=None): the bytes of a PNG."""
    return _png


@pytest.fixture(scope="session")
def jpeg() -> bytes:
    """A grey JPEG of 64x64 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def record(tmp_path: Path) -> Callable[[bytes], ImageRecord]:
    """record(bytes): the record of a file that holds them."""

    def write(data: bytes) -> ImageRecord:
        path = tmp_path / "mask.png"
        path.write_bytes(data)
        return ImageRecord("mask", path, 0, len(data), None, "png")

    return write
