"""Encoded images for tests in which names and bytes matter, not pixels."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image


def _png(seed: int = 0, width: int = 20, height: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """png(seed=0, width=20, height=12): the bytes of a random image."""
    return _png
