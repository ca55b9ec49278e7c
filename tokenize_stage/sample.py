"""Which patches of which images train the codebook: a uniform sample that depends on the seed and the keys alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..shared.images import ImageRecord
from ..shared.randomness import generator


@dataclass(frozen=True)
class PatchSample:
    """A uniform sample without replacement over all patches of all images, as parallel arrays sorted by image.

    `image` (n,) and `patch` (n,) name the patch, `row` (n,) is its place in the sample's random order: rows below
    `train` are for training, the others are held out.
    """

    image: np.ndarray
    patch: np.ndarray
    row: np.ndarray
    train: int

    def __len__(self) -> int:
        return len(self.row)


def choose_images(records: Sequence[ImageRecord], max_images: int | None, seed: int) -> list[ImageRecord]:
    """All images, or a seeded uniform subset of `max_images` in the source's order."""
    if max_images is None or max_images >= len(records):
        return list(records)
    draws = np.array([generator(seed, "image sample", record.key).random() for record in records])
    return [records[index] for index in np.sort(np.argsort(draws, kind="stable")[:max_images])]


def draw_sample(keys: Sequence[str], patches_per_image: int, train: int, held_out: int, seed: int) -> PatchSample:
    """Draws `train + held_out` of the `len(keys) * patches_per_image` patches.

    Each patch gets a random number from (seed, key) and the smallest win, so the sample does not depend on the order
    of images, batch size, workers or processes. Memory: 16 bytes a sampled patch, and one block of images.
    """
    wanted = train + held_out
    draws = np.empty(0, dtype=np.uint64)
    places = np.empty(0, dtype=np.int64)
    block = max(1, (1 << 20) // patches_per_image)
    for start in range(0, len(keys), block):
        some = keys[start : start + block]
        new = [generator(seed, "patch sample", key).bit_generator.random_raw(patches_per_image) for key in some]
        draws = np.concatenate([draws, *new])
        first = start * patches_per_image
        places = np.concatenate([places, np.arange(first, first + len(some) * patches_per_image)])
        if len(draws) > wanted:
            smallest = np.argpartition(draws, wanted - 1)[:wanted]
            draws, places = draws[smallest], places[smallest]
    row = np.empty(len(draws), dtype=np.int64)
    row[np.argsort(draws, kind="stable")] = np.arange(len(draws))
    by_image = np.argsort(places, kind="stable")
    image, patch = np.divmod(places[by_image], patches_per_image)
    return PatchSample(image, patch, row[by_image], train)
