"""Which patches of which images train the codebook: a uniform sample that depends on the seed and the keys alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...shared.randomness import generator


@dataclass(frozen=True)
class PatchSample:
    """A uniform sample without replacement over all patches of all images.

    Every patch has a random number, its draw, from (seed, key); the sample is the patches whose draws are at most
    `most`, in the order of their draws. Those up to `most_train` are for training, the others are held out. So each
    image's share is known without the others: nothing depends on the order of images, batch size, workers or
    processes, and a smaller sample is the beginning of a larger one.
    """

    seed: int
    patches_per_image: int
    most_train: int
    most: int

    def of_image(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The image's sampled patches (m,) int64 and their draws (m,) uint64."""
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

    Memory: 8 bytes a sampled patch, and one block of images.
    """
    wanted = min(train + held_out, len(keys) * patches_per_image)
    draws = np.empty(0, dtype=np.uint64)
    block = max(1, (1 << 20) // patches_per_image)
    for start in range(0, len(keys), block):
        new = [_draws(seed, key, patches_per_image) for key in keys[start : start + block]]
        draws = np.concatenate([draws, *new])
        if len(draws) > wanted:
            draws.partition(wanted - 1)
            draws = draws[:wanted].copy()
    draws.sort()
    return PatchSample(seed, patches_per_image, int(draws[min(train, wanted) - 1]), int(draws[wanted - 1]))


def _draws(seed: int, key: str, count: int) -> np.ndarray:
    return generator(seed, "patch sample", key).bit_generator.random_raw(count)
