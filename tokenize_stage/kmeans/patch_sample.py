"""Draws the patches that train a codebook: a uniform sample that depends only on the seed and the keys."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...shared.randomness import generator


@dataclass(frozen=True)
class PatchSample:
    """A uniform sample without replacement over all patches of all images.

    Every patch has a random number, its draw, from (seed, key). The sample is the patches whose draws are at most
    `most`, in the order of their draws; those up to `most_train` are for training, the others are held out. Thus the
    sampled patches of an image do not depend on other images, nor on batch size, workers or processes, and a smaller
    sample is a prefix of a larger one.
    """

    seed: int
    patches_per_image: int
    most_train: int
    most: int

    def of_image(self, key: str) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The sampled patches (m,) of an image, counted row by row, and their draws (m,)."""
        draws = _draws(self.seed, key, self.patches_per_image)
        patches = np.flatnonzero(draws <= np.uint64(self.most))
        return patches, draws[patches]


def choose_images(keys: Sequence[str], max_images: int | None, seed: int) -> list[str]:
    """All keys, or a seeded uniform subset of `max_images` in the source's order."""
    if max_images is None or max_images >= len(keys):
        return list(keys)
    draws = np.array([generator(seed, "image sample", key).random() for key in keys])
    return [keys[index] for index in np.sort(np.argsort(draws, kind="stable")[:max_images])]


def draw_sample(keys: Sequence[str], patches_per_image: int, train: int, held_out: int, seed: int) -> PatchSample:
    """Draws `train + held_out` of the `len(keys) * patches_per_image` patches, or all if there are fewer.

    Takes 8 bytes of memory per sampled patch, and one block of images.
    """
    wanted = min(train + held_out, len(keys) * patches_per_image)
    draws = np.empty(0, dtype=np.uint64)
    block = max(1, (1 << 20) // patches_per_image)
    for start in range(0, len(keys), block):
        block_draws = [_draws(seed, key, patches_per_image) for key in keys[start : start + block]]
        draws = np.concatenate([draws, *block_draws])
        if len(draws) > wanted:
            draws.partition(wanted - 1)
            draws = draws[:wanted].copy()
    draws.sort()
    return PatchSample(seed, patches_per_image, int(draws[min(train, wanted) - 1]), int(draws[wanted - 1]))


def _draws(seed: int, key: str, count: int) -> NDArray[np.uint64]:
    draws: NDArray[np.uint64] = generator(seed, "patch sample", key).bit_generator.random_raw(count)
    return draws
