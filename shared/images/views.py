"""Views: the crop box and flip that an image and its tokens share."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import UsageError
from ..randomness import generator

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


class CropBox(NamedTuple):
    """A crop of an upright image, in source pixels that are not rounded; stored as float64."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True)
class Preprocess:
    """A tower's preprocessing: resize, centre crop, then (pixel / 255 - mean) / std."""

    image_size: int
    """Height and width of the crop, in pixels."""
    resize: str
    """"shortest" (the shorter side becomes `resize_size`) or "squash" (both sides do)."""
    resize_size: int
    interpolation: str
    """"bicubic", "bilinear" or "lanczos"."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocess":
        """The inverse of `to_json`."""
        return cls(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}


CROPS = ("center", "random-resized")
_ATTEMPTS = 10
"""As in torchvision's RandomResizedCrop."""


@dataclass(frozen=True)
class ViewPolicy:
    """How the views of an image are drawn: a pure function of (seed, key, view number, image size).

    Raises UsageError for values that are out of range.
    """

    crop: str = "center"
    """"center" (one view, the tower's preprocessing) or "random-resized" (crops as drawn by torchvision's
    RandomResizedCrop)."""
    views: int = 1
    """Views per image."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Lowest and highest area of a crop, as a fraction of the image's."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Lowest and highest ratio of a crop's width to its height."""
    flip: float = 0.5
    """Probability that a view is mirrored left to right."""
    with_center: bool = False
    """Whether view 0 is the centre view."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise UsageError(f"--crop {self.crop} is unknown; choose {' or '.join(CROPS)}.")
        if self.views < 1:
            raise UsageError(f"--views {self.views} must be at least 1.")
        if self.crop == "center" and (self.views > 1 or self.with_center):
            raise UsageError(
                f"--views {self.views} with --crop center would store the same view repeatedly; "
                "add --crop random-resized (and --with-center to have view 0 centred)."
            )
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UsageError(f"--scale {low} {high} must be two fractions of the area with 0 < low <= high <= 1.")
        low, high = self.ratio
        if not 0 < low <= high < math.inf:
            raise UsageError(f"--ratio {low} {high} must be two positive numbers, the lower one first.")
        if not 0 <= self.flip <= 1:
            raise UsageError(f"--flip {self.flip} must be a probability from 0 to 1.")

    def to_json(self) -> dict[str, Any]:
        """The fields that affect the views, as JSON values."""
        if self.crop == "center":
            return {"crop": self.crop, "views": self.views}
        return {**asdict(self), "scale": list(self.scale), "ratio": list(self.ratio)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ViewPolicy":
        """The inverse of `to_json`."""
        pairs: dict[str, Any] = {name: tuple(fields[name]) for name in ("scale", "ratio") if name in fields}
        return cls(**{**fields, **pairs})

    def is_centre(self, view: int) -> bool:
        """Whether this view is the tower's preprocessing, not a random crop."""
        return self.crop == "center" or (self.with_center and view == 0)

    def draw(self, key: str, view: int, width: int, height: int) -> tuple["CropBox", bool]:
        """Draws crop box and flip of a random-resized view of a `width` x `height` image."""
        random = generator(self.seed, "view", view, key)
        box = self._draw_box(random, width, height)
        return box, bool(random.random() < self.flip)

    def _draw_box(self, random: np.random.Generator, width: int, height: int) -> "CropBox":
        low, high = (math.log(value) for value in self.ratio)
        for _ in range(_ATTEMPTS):
            area = width * height * random.uniform(*self.scale)
            ratio = math.exp(random.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = random.integers(0, height - h + 1), random.integers(0, width - w + 1)
                return CropBox(float(top), float(left), float(h), float(w))
        # No attempt fitted, as in a long, narrow image: the largest central box that `ratio` allows.
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return CropBox(float((height - h) // 2), float((width - w) // 2), float(h), float(w))


CENTER = ViewPolicy()


def view_of_epoch(views: int, seed: int, epoch: int, key: str) -> int:
    """The number of the stored view that an epoch uses: all of an image's in turn, in an order drawn for each cycle."""
    if views == 1:
        return 0
    cycle, within = divmod(epoch, views)
    return int(generator(seed, "views", cycle, key).permutation(views)[within])


def resized(preprocess: Preprocess, width: int, height: int) -> tuple[int, int]:
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


def resized_whole(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """The whole image as the tower's preprocessing resizes it, before the crop."""
    return image.resize(resized(preprocess, *image.size), _FILTERS[preprocess.interpolation])


def center_view(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """The tower's preprocessing up to the normalisation: resizes the whole image, then crops its centre."""
    resized_image = resized_whole(image, preprocess)
    left, top = _corner(preprocess, *resized_image.size)
    size = preprocess.image_size
    return resized_image.crop((left, top, left + size, top + size))


def center_box(preprocess: Preprocess, width: int, height: int) -> CropBox:
    """The box, in source pixels, that `center_view` shows of a `width` x `height` image."""
    resized_width, resized_height = resized(preprocess, width, height)
    left, top = _corner(preprocess, resized_width, resized_height)
    x, y = width / resized_width, height / resized_height
    size = preprocess.image_size
    return CropBox(top=top * y, left=left * x, height=size * y, width=size * x)


def show_view(
    image: Image.Image, policy: ViewPolicy, key: str, view: int, preprocess: Preprocess
) -> tuple[Image.Image, CropBox, bool]:
    """One view as the tower sees it, with the box and flip that are stored."""
    if policy.is_centre(view):
        return center_view(image, preprocess), center_box(preprocess, *image.size), False
    box, flip = policy.draw(key, view, *image.size)
    return replay(image, box, flip, preprocess.image_size, preprocess.interpolation), box, flip


def replay(image: Image.Image, box: CropBox, flip: bool, size: int, interpolation: str = "bicubic") -> Image.Image:
    """Replays a stored view at any resolution: resizes `box` of the upright image to `size` x `size`, then flips."""
    right = min(box.left + box.width, image.width)
    bottom = min(box.top + box.height, image.height)
    crop = image.resize((size, size), _FILTERS[interpolation], box=(box.left, box.top, right, bottom))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels of an RGB image, uint8 (3, height, width)."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
