"""Pictures and colours inside a page."""

import base64
import colorsys
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def data_uri(image: Image.Image, quality: int = 78) -> str:
    """An RGB image as a data: URI of WebP."""
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def overlay_uri(classes: NDArray[np.integer[Any]], colours: NDArray[np.uint8]) -> str:
    """A map of classes (height, width) as a data: URI of PNG: colour i of `colours` (K, 3) for class i, and transparent
    where it is negative."""
    opaque = np.where(classes < 0, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.dstack([colours[np.maximum(classes, 0)], opaque])).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def golden_colours(k: int) -> NDArray[np.uint8]:
    """K colours, uint8 (K, 3), of which neighbours differ clearly: hues a golden angle apart, in three tones."""
    return np.array(
        [
            [round(255 * part) for part in colorsys.hls_to_rgb(code * 0.618034 % 1, (0.5, 0.62, 0.4)[code % 3], 0.62)]
            for code in range(k)
        ],
        dtype=np.uint8,
    )


def hex_colours(colours: NDArray[np.integer[Any]]) -> str:
    """Colours (K, 3) from 0 to 255 as one string, six hexadecimal digits per colour."""
    return np.ascontiguousarray(colours, dtype=np.uint8).tobytes().hex()
