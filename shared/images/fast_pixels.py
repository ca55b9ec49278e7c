"""The student's pixels: JPEGs decoded and views replayed as uint8 tensors, in half Pillow's time.

simplejpeg's libjpeg-turbo decodes a JPEG to the same pixels as Pillow, and faster than torchvision does; Pillow decodes
the rest. The resize is torch's fixed-point one. The reference is `views.replay`, which also cuts the random crops that
the tower sees.
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
"""The operator of each filter, and its support in pixels of the smaller of the two resolutions."""
_MARGINS = np.arange(64)
_NEAR, _FAR = 0.01, 0.05
"""Source pixels by which rounding may shift a box. The margin grows until the shift is below the first; where the
smallest shift is above the second, Pillow replays the view."""


def is_plain_jpeg(data: bytes, name: str, max_pixels: int | None = None) -> bool:
    """Whether simplejpeg decodes `data` to the same pixels as Pillow: an upright JPEG of one picture that is not CMYK.

    Raises DataError, which names `name`, if the bytes are not an image.
    """
    with decoding(data, name):
        image = open_image(data, max_pixels)
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image.format == "JPEG" and image.mode in ("RGB", "L") and upright


def decode_pixels(data: bytes, name: str, plain: bool | None = None, max_pixels: int | None = None) -> Tensor:
    """The pixels of `decode.decode`, as uint8 (3, height, width), channels last in memory; DataError as there.

    `plain` is the result of `is_plain_jpeg` for the same bytes, if it is known already.
    """
    if is_plain_jpeg(data, name, max_pixels) if plain is None else plain:
        try:
            return torch.from_numpy(decode_jpeg(data, "RGB")).permute(2, 0, 1)
        except Exception:  # decoders raise anything on damaged data; Pillow may read it, or says what is wrong  # noqa: S110
            pass
    return torch.from_numpy(np.array(decode(data, name, max_pixels))).permute(2, 0, 1)


def replay_pixels(pixels: Tensor, box: CropBox, flip: bool, size: int, interpolation: str = "bicubic") -> Tensor:
    """`views.replay` for pixels uint8 (3, height, width): uint8 (3, size, size), in any memory format.

    On photographs the two differ by less than a tenth of a grey level on average (see the tests): torch's weights have
    16 bits, a box between source pixels is placed to a few hundredths of a pixel, and filters do not reach beyond the
    upper and left edges of a box on whole pixels.
    """
    resize, support = _RESIZE[interpolation]
    rows = _span(box.top, box.height, pixels.shape[1], size, support)
    columns = _span(box.left, box.width, pixels.shape[2], size, support)
    if rows is None or columns is None:
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        return torch.from_numpy(to_array(replay(image, box, flip, size, interpolation)))
    # torch is slower unless the region is contiguous with channels last.
    region = pixels[None, :, rows.begin : rows.end, columns.begin : columns.end]
    region = region.contiguous(memory_format=torch.channels_last)
    resized = resize(region, [rows.margin + size, columns.margin + size], False, 1 / rows.scale, 1 / columns.scale)
    view = resized[0, :, rows.margin :, columns.margin :]
    return view.flip(2) if flip else view


class _Span(NamedTuple):
    """Along one axis: source pixels [begin, end) are resized to margin + size pixels, then the margin is cut off.

    `scale` is source pixels per pixel of the view.
    """

    begin: int
    end: int
    margin: int
    scale: float


def _span(start: float, length: float, whole: int, size: int, support: int) -> _Span | None:
    """The span that shows `length` of `whole` source pixels, from `start` on, in `size` pixels.

    torch resizes regions that begin at whole pixels. A box that begins between two of them gets a margin wide enough
    for the region to begin close to a whole one; None if the box is too close to the image's border for that.
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
        # With equal input and output sizes torch would copy the pixels, whatever the scale.
        end += 1 if end < whole else -1
    return _Span(begin, end, margin, scale)
