"""Variants of a stored view whose patches can be matched with each other: mirrored, enlarged, and shifted."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...shared.images.views import CropBox, Preprocess, ViewPolicy, center_view, replay, to_array
from ..counting.overlaps import seen_in

Tokens = NDArray[np.integer[Any]]
"""Token indices, of any integer type."""


class StoredView(NamedTuple):
    """One view of an image as a store describes it."""

    number: int
    box: CropBox
    flip: bool


class Variants:
    """Four views for each stored view of S x S pixels and H x W patches, in the order of `pixels`.

    0. the stored view itself;
    1. the same pixels, mirrored;
    2. the upper left S x S pixels of the view enlarged by m patches, to S + m S / H pixels a side;
    3. the lower right S x S pixels of the same enlarged view.

    Views 2 and 3 share (H - m) x (W - m) patches, whose pixels are identical and whose surroundings are not. m is a
    quarter of the grid, and at least one patch.
    """

    COUNT = 4

    def __init__(self, preprocess: Preprocess, grid: tuple[int, int], policy: ViewPolicy):
        self.preprocess, self.policy = preprocess, policy
        height, width = grid
        size = preprocess.image_size
        self.shift = max(round(min(grid) / 4), 1)
        # Patches of another size in the two directions, or of a fraction of a pixel, cannot be shifted exactly.
        self.is_shiftable = height == width > self.shift and size % height == 0
        self.margin = size // height * self.shift
        self.grid = grid

    def pixels(self, image: Image.Image, stored: StoredView) -> NDArray[np.uint8]:
        """uint8 (4, 3, S, S)."""
        size, resampling = self.preprocess.image_size, self.preprocess.interpolation
        if self.policy.is_centre(stored.number):
            view = to_array(center_view(image, self.preprocess))
        else:
            view = to_array(replay(image, stored.box, stored.flip, size, resampling))
        enlarged = to_array(replay(image, stored.box, stored.flip, size + self.margin, resampling))
        return np.stack([view, view[:, :, ::-1], enlarged[:, :size, :size], enlarged[:, -size:, -size:]])

    def mirrored(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        """Tokens (n, 4, H, W) -> those of the view and, at the same place in the picture, of the mirrored one: (n, p)
        each."""
        return _flat(tokens[:, 0]), _flat(tokens[:, 1, :, ::-1])

    def shifted(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        """Tokens (n, 4, H, W) -> those of the patches that views 2 and 3 share: (n, p) each."""
        m, (height, width) = self.shift, self.grid
        return _flat(tokens[:, 2, m:, m:]), _flat(tokens[:, 3, : height - m, : width - m])

    def rescaled(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        """Tokens (n, 4, H, W) -> those of the view, and of the patch of an enlarged view that contains its centre."""
        size, side = float(self.preprocess.image_size), float(self.preprocess.image_size + self.margin)
        whole, unflipped = np.array([[0.0, 0.0, side, side]]), np.zeros(1, np.bool_)
        pairs = []
        for number, corner in ((2, 0.0), (3, float(self.margin))):
            box = np.array([[corner, corner, size, size]])
            patches = seen_in(whole, unflipped, box, unflipped, self.grid)[0]
            here = patches >= 0
            pairs.append((_flat(tokens[:, 0])[:, here], _flat(tokens[:, number])[:, patches[here]]))
        first, second = zip(*pairs, strict=True)
        return np.concatenate(first, axis=1), np.concatenate(second, axis=1)


def _flat(tokens: Tokens) -> Tokens:
    return tokens.reshape(len(tokens), -1)
