"""Views: the crop (box in upright source pixels, flip) that an image and its tokens share."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class CropBox(NamedTuple):
    """A crop in upright source pixels, not rounded; stored as float64."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True)
class Preprocess:
    """What a tower sees of an image: resize, centre crop to `image_size` pixels square, then (x / 255 - mean) / std.

    `resize` is "shortest" (the shorter side becomes `resize_size`) or "squash" (both sides become `resize_size`).
    """

    image_size: int
    resize: str
    resize_size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocess":
        return cls(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}


def _resized(preprocess: Preprocess, width: int, height: int) -> tuple[int, int]:
    """(width, height) after the resize, rounded as torchvision's `Resize` rounds."""
    size = preprocess.resize_size
    if preprocess.resize == "squash":
        return size, size
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _corner(preprocess: Preprocess, width: int, height: int) -> tuple[int, int]:
    """(left, top) of the centre crop in the resized image, rounded as torchvision's `CenterCrop` rounds."""
    size = preprocess.image_size
    return round((width - size) / 2.0), round((height - size) / 2.0)


def center_view(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """The tower's own preprocessing up to the tensor: resize the whole image, then crop its centre."""
    width, height = _resized(preprocess, *image.size)
    left, top = _corner(preprocess, width, height)
    size = preprocess.image_size
    resized = image.resize((width, height), _FILTERS[preprocess.interpolation])
    return resized.crop((left, top, left + size, top + size))


def center_box(preprocess: Preprocess, width: int, height: int) -> CropBox:
    """The box, in source pixels, that `center_view` shows of a `width` x `height` image."""
    resized_width, resized_height = _resized(preprocess, width, height)
    left, top = _corner(preprocess, resized_width, resized_height)
    x, y = width / resized_width, height / resized_height
    size = preprocess.image_size
    return CropBox(top=top * y, left=left * x, height=size * y, width=size * x)


def replay(image: Image.Image, box: CropBox, flip: bool, size: int, interpolation: str = "bicubic") -> Image.Image:
    """Shows a stored view at another resolution: crops `box` of the upright image to `size` x `size`, then flips."""
    right = min(box.left + box.width, image.width)
    bottom = min(box.top + box.height, image.height)
    crop = image.resize((size, size), _FILTERS[interpolation], box=(box.left, box.top, right, bottom))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop


def to_array(image: Image.Image) -> np.ndarray:
    """RGB image -> uint8 (3, height, width)."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
