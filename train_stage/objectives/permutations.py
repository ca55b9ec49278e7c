"""The order of an image's patches, those given first: drawn uniformly, in blocks, or by masking (MIM)."""

import numpy as np

from ..settings import ObjectiveSettings

# BEiT (arXiv 2106.08254, algorithm 1): rectangles of at least 16 of 196 patches, aspect ratio between 0.3 and 1 / 0.3.
_SMALLEST_BLOCK = 16 / 196
_LARGEST_ASPECT = 1 / 0.3
_ATTEMPTS = 10


def draw_permutation(settings: ObjectiveSettings, side: int, random: np.random.Generator) -> np.ndarray:
    """(side * side,) int64: the patches in raster order, permuted; what is predicted comes after what is given.

    For "mim" the last `settings.masked(side * side)` are the masked ones, otherwise the order is the permutation of
    the paper (section 3).
    """
    patches = side * side
    if settings.name == "mim" and settings.masking == "block":
        hidden = masked_blocks(side, settings.masked(patches), random).ravel()
        return np.concatenate([np.flatnonzero(~hidden), np.flatnonzero(hidden)])
    if settings.name != "mim" and settings.permutation == "block":
        return permuted_blocks(side, settings.permutation_block, random)
    return random.permutation(patches)


def permuted_blocks(side: int, block: int, random: np.random.Generator) -> np.ndarray:
    """(side * side,) int64: squares of `block` x `block` patches in random order, their patches in random order.

    The squares tile the image from a random offset; those at the border are cut.
    """
    row, column = np.divmod(np.arange(side * side), side)
    down, right = random.integers(block, size=2)
    square = (row + down) // block * (side + block) + (column + right) // block
    _, square = np.unique(square, return_inverse=True)
    turn = random.permutation(square.max() + 1)
    return np.lexsort((random.random(side * side), turn[square]))


def masked_blocks(side: int, count: int, random: np.random.Generator) -> np.ndarray:
    """(side, side) bool, exactly `count` of them True: rectangles at random places (BEiT, algorithm 1).

    Where no further rectangle fits into the count, single patches at random make it up.
    """
    hidden = np.zeros((side, side), dtype=bool)
    while (missing := count - hidden.sum()) > 0:
        if not any(_add_rectangle(hidden, missing, random) for _ in range(_ATTEMPTS)):
            hidden.ravel()[random.choice(np.flatnonzero(~hidden.ravel()), missing, replace=False)] = True
    return hidden


def _add_rectangle(hidden: np.ndarray, most: int, random: np.random.Generator) -> bool:
    side = len(hidden)
    area = random.uniform(min(_SMALLEST_BLOCK * side * side, most), most)
    aspect = np.exp(random.uniform(-np.log(_LARGEST_ASPECT), np.log(_LARGEST_ASPECT)))
    height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    if not (1 <= height <= side and 1 <= width <= side):
        return False
    top, left = random.integers(side - height, endpoint=True), random.integers(side - width, endpoint=True)
    rectangle = hidden[top : top + height, left : left + width]
    if not 0 < (~rectangle).sum() <= most:
        return False
    rectangle[:] = True
    return True
