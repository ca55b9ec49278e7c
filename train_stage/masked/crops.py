"""Random crops for training, and whole images for sliding windows, each with its mask."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...shared.images.decode import read_image
from ...shared.images.views import Preprocess, resized_whole, to_array
from ...shared.randomness import generator
from .masked_images import MaskedImage
from .masks import IGNORED, MaskRule, read_mask

SCALES = (0.5, 2.0)
"""Lowest and highest shorter side of a training image, as a multiple of the model's input (as in DINOv3)."""


class Place(NamedTuple):
    """An image of a step."""

    step: int
    image: int


def places(count: int, steps: int, batch: int, seed: int) -> Iterator[list[Place]]:
    """Yields the images of each step, (epoch after epoch) every image once in an order drawn by (seed, epoch)."""
    epoch, order = 0, list[int]()
    for step in range(steps):
        while len(order) < batch:
            order += generator(seed, "segment", "order", epoch).permutation(count).tolist()
            epoch += 1
        yield [Place(step, image) for image in order[:batch]]
        order = order[batch:]


@dataclass(frozen=True)
class RandomCrops:
    """Crops of the model's input size, S x S, from images of a random scale, mirrored in half of the draws."""

    images: Sequence[MaskedImage]
    rule: MaskRule
    preprocess: Preprocess
    seed: int

    def __call__(self, place: Place) -> dict[str, Any]:
        """`pixels` (3, S, S) uint8 and `mask` (S, S) int16, a pure function of seed, step and key."""
        pair = self.images[place.image]
        random = generator(self.seed, "segment", "crop", place.step, pair.image.key)
        pixels, mask = random_crop(pair, self.rule, self.preprocess, random)
        return {"pixels": pixels, "mask": mask}


def random_crop(
    pair: MaskedImage,
    rule: MaskRule,
    preprocess: Preprocess,
    random: np.random.Generator,
    scales: tuple[float, float] = SCALES,
    flip: float = 0.5,
) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """The pixels (3, S, S) and the mask (S, S) of a crop of the model's input size.

    The image's shorter side is first scaled to `scales` times S; `flip` is the probability of mirroring. What a small
    image does not fill is the mean colour, and ignored. Raises DataError for an image or a mask that cannot be read.
    """
    size = preprocess.image_size
    image = _scaled(read_image(pair.image)[0], max(1, round(size * random.uniform(*scales))), preprocess)
    mask = nearest(read_mask(pair.mask, rule), image.height, image.width)
    top, left = (int(random.integers(0, max(length - size, 0) + 1)) for length in mask.shape)
    canvas = np.full((size, size), IGNORED, np.int16)
    crop = mask[top : top + size, left : left + size]
    canvas[: crop.shape[0], : crop.shape[1]] = crop
    colour = tuple(round(255 * mean) for mean in preprocess.mean)
    picture = Image.new("RGB", (size, size), colour)
    picture.paste(image.crop((left, top, left + crop.shape[1], top + crop.shape[0])))
    if random.random() < flip:
        picture, canvas = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), canvas[:, ::-1]
    return to_array(picture), np.ascontiguousarray(canvas)


@dataclass(frozen=True)
class WholeImages:
    """Images whose shorter side is the model's input size, each with its mask as it is."""

    images: Sequence[MaskedImage]
    rule: MaskRule
    preprocess: Preprocess

    def __call__(self, index: int) -> dict[str, Any]:
        """`pixels` (3, height, width) uint8 and `mask` (its height, its width) int16."""
        pair, size = self.images[index], self.preprocess.image_size
        image, mask = read_image(pair.image)[0], read_mask(pair.mask, self.rule)
        return {"pixels": to_array(_scaled(image, size, self.preprocess)), "mask": mask}


def nearest(mask: NDArray[np.int16], height: int, width: int) -> NDArray[np.int16]:
    """A mask at another size: each pixel is the one at its centre."""
    rows, columns = (
        ((np.arange(to) + 0.5) * length / to).astype(int)
        for to, length in zip((height, width), mask.shape, strict=True)
    )
    resized: NDArray[np.int16] = mask[rows][:, columns]
    return resized


def _scaled(image: Image.Image, shorter: int, preprocess: Preprocess) -> Image.Image:
    """The image with a shorter side of so many pixels."""
    return resized_whole(image, replace(preprocess, resize="shortest", resize_size=shorter))
