"""The student's pixels: JPEGs decoded and views replayed as uint8 tensors, in half the time that Pillow takes.

simplejpeg's libjpeg-turbo gives Pillow's very pixels of a JPEG, faster than torchvision's does; whatever it does not
take, Pillow decodes. The resize is torch's fixed-point one. `views.replay` is the reference, and what a tower sees.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from simplejpeg import decode_jpeg
from torch import Tensor

from ..runtime.compat import resize_bicubic, resize_bilinear
from .decode import decode, decoding, open_image
from .views import CropBox, replay, to_array

_RESIZE = {
    "bicubic": (resize_bicubic, 2),
    "bilinear": (resize_bilinear, 1),
}
"""The operator of each filter, and how far it looks, in pixels of the smaller of the two resolutions."""
_MARGINS = np.arange(64)
_NEAR, _FAR = 0.01, 0.05
"""Source pixels by which a view may be shifted: what is not worth a wider margin, and what Pillow must do instead."""


def is_plain_jpeg(data: bytes, name: str) -> bool:
    """Whether simplejpeg gives Pillow's very pixels of it: a JPEG that is no CMYK, has nothing to turn, and is nothing
    but one picture. Raises DataError naming `name` if the bytes are no image."""
    with decoding(data, name):
        image = open_image(data)
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image.format == "JPEG" and image.mode in ("RGB", "L") and upright


def decode_pixels(data: bytes, name: str, plain: bool | None = None) -> Tensor:
    """What `images.decode` gives, as uint8 (3, height, width), channels last in memory; raises DataError as it does.

    `plain` is what `is_plain_jpeg` said of the same bytes, if it was asked before.
    """
    if is_plain_jpeg(data, name) if plain is None else plain:
        try:
            return torch.from_numpy(decode_jpeg(data, "RGB")).permute(2, 0, 1)
        except Exception:  # a decoder raises whatever the bytes lead it to; Pillow says why, or can read it
            pass
    return torch.from_numpy(np.array(decode(data, name))).permute(2, 0, 1)


def replay_pixels(pixels: Tensor, box: CropBox, flip: bool, size: int, interpolation: str = "bicubic") -> Tensor:
    """What `views.replay` shows of uint8 (3, height, width): uint8 (3, size, size), in any memory format.

    On photographs the two differ by less than a tenth of a grey level on average (see tests): torch's weights have 16
    bits, a box between source pixels is met to a few hundredths of one, and a filter does not look beyond the upper and
    left edges of a box on whole pixels.
    """
    resize, support = _RESIZE[interpolation]
    rows = _span(box.top, box.height, pixels.shape[1], size, support)
    columns = _span(box.left, box.width, pixels.shape[2], size, support)
    if rows is None or columns is None:
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        return torch.from_numpy(to_array(replay(image, box, flip, size, interpolation)))
    # Contiguous with channels last, or torch takes a slower way.
    region = pixels[None, :, rows.begin : rows.end, columns.begin : columns.end]
    region = region.contiguous(memory_format=torch.channels_last)
    shown = resize(region, [rows.margin + size, columns.margin + size], False, 1 / rows.scale, 1 / columns.scale)
    shown = shown[0, :, rows.margin :, columns.margin :]
    return shown.flip(2) if flip else shown


class _Span(NamedTuple):
    """Along one side: source pixels [begin, end) are resized by `scale` to margin + size pixels; the margin is cut."""

    begin: int
    end: int
    margin: int
    scale: float


def _span(start: float, length: float, whole: int, size: int, support: int) -> _Span | None:
    """How torch, whose regions begin at whole pixels only, can show `length` pixels from `start` of `whole` in `size`.

    A box that begins between two pixels gets a margin as wide as brings that beginning to a whole one. None if the box
    lies too near the image's border for that.
    """
    scale, margin = length / size, 0
    if start % 1:
        begins = start - _MARGINS * scale
        misses = np.abs(begins - np.rint(begins))
        misses[np.rint(begins) < 0] = 1
        margin = int(np.argmin(np.maximum(misses, _NEAR)))
        if misses[margin] > _FAR:
            return None
    begin = round(start - margin * scale)
    end = min(math.ceil(start + length + support * max(scale, 1)), whole)
    if end - begin == margin + size > 1 and scale != 1:
        # As many pixels as before: torch would copy them, whatever the scale.
        end += 1 if end < whole else -1
    return _Span(begin, end, margin, scale)
