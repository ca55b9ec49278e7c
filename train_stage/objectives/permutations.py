"""Draws the order of an image's patches, visible ones first: uniformly, in blocks, or by masking (MIM)."""

import numpy as np
from numpy.typing import NDArray

from ..settings import ObjectiveSettings

# BEiT (arXiv 2106.08254, algorithm 1): rectangles of at least 16 of 196 patches, aspect ratio between 0.3 and 1 / 0.3.
_SMALLEST_BLOCK = 16 / 196
_LARGEST_ASPECT = 1 / 0.3
_ATTEMPTS = 10


def draw_permutation(settings: ObjectiveSettings, side: int, random: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of an image's patches: visible ones first, then those that are predicted.

    For "mim" the last `settings.masked(side * side)` patches are the masked ones; otherwise the order is the
    permutation of the paper (section 3).

    Args:
        settings: the objective.
        side: patches along one side of the image.
        random: the generator to draw from.

    Returns:
        (side * side,) int64, indices of patches in raster order.
    """
    patches = side * side
    if settings.name == "mim" and settings.masking == "block":
        masked = masked_blocks(side, settings.masked(patches), random).ravel()
        return np.concatenate([np.flatnonzero(~masked), np.flatnonzero(masked)])
    if settings.name != "mim" and settings.permutation == "block":
        return permuted_blocks(side, settings.permutation_block, random)
    return random.permutation(patches)


def permuted_blocks(side: int, block: int, random: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of squares of `block` x `block` patches, each with its patches in random order.

    The squares tile the image from a random offset; those at the border are cut. Returns (side * side,) int64, indices
    of patches in raster order.
    """
    row, column = np.divmod(np.arange(side * side), side)
    down, right = random.integers(block, size=2)
    square = (row + down) // block * (side + block) + (column + right) // block
    _, square = np.unique(square, return_inverse=True)
    rank = random.permutation(square.max() + 1)
    return np.lexsort((random.random(side * side), rank[square]))


def masked_blocks(side: int, count: int, random: np.random.Generator) -> NDArray[np.bool_]:
    """A mask of rectangles at random places (BEiT, algorithm 1).

    Once no further rectangle fits into the count, single patches at random places fill it up. Returns (side, side)
    bool, True for exactly `count` masked patches.
    """
    masked = np.zeros((side, side), dtype=bool)
    while (missing := count - masked.sum()) > 0:
        if not any(_add_rectangle(masked, missing, random) for _ in range(_ATTEMPTS)):
            masked.ravel()[random.choice(np.flatnonzero(~masked.ravel()), missing, replace=False)] = True
    return masked


def _add_rectangle(masked: NDArray[np.bool_], most: int, random: np.random.Generator) -> bool:
    """Masks a rectangle with 1 to `most` new patches, in place; False if the one that is drawn does not fit."""
    side = len(masked)
    area = random.uniform(min(_SMALLEST_BLOCK * side * side, most), most)
    aspect = np.exp(random.uniform(-np.log(_LARGEST_ASPECT), np.log(_LARGEST_ASPECT)))
    height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    if not (1 <= height <= side and 1 <= width <= side):
        return False
    top, left = random.integers(side - height, endpoint=True), random.integers(side - width, endpoint=True)
    rectangle = masked[top : top + height, left : left + width]
    if not 0 < (~rectangle).sum() <= most:
        return False
    rectangle[:] = True
    return True
