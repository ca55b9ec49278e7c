"""Pictures inside a page."""

import base64
import colorsys
import io

import numpy as np
from PIL import Image


def data_uri(image: Image.Image, quality: int = 78) -> str:
    """An RGB image as WebP in a data: URI."""
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def golden_colours(k: int) -> np.ndarray:
    """K colours, uint8 (K, 3), of which neighbours differ most: each a golden angle from the last, three tones."""
    return np.array(
        [
            [round(255 * part) for part in colorsys.hls_to_rgb(code * 0.618034 % 1, (0.5, 0.62, 0.4)[code % 3], 0.62)]
            for code in range(k)
        ],
        dtype=np.uint8,
    )


def hex_colours(colours: np.ndarray) -> str:
    """uint8 (K, 3) as one string of six hexadecimal digits a colour."""
    return np.ascontiguousarray(colours, dtype=np.uint8).tobytes().hex()
