"""What the tokens of two stores say about each other, whatever their codebooks are."""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from ..counting.information import Information, Joint, information, ranks, rolled
from ..counting.overlaps import seen_in
from ..counting.sample import SampledImages


class SharedInformation(TypedDict):
    """What the codes of one store say about those of another store at the same place of the same image.

    A patch of the first store meets the patch of the second one that contains its centre, in the view of the same
    number, so that the grids and the crops may differ.
    """

    images: int
    patches: int
    information: Information | None
    """Chance pairs the tokens of one image with those of another one. None where both stores have a single code."""


def shared_information(here: SampledImages, there: SampledImages) -> SharedInformation | None:
    """What the codes of two samples say about each other; None if they have no patch in common."""
    _, mine, yours = np.intersect1d(here.hashes, there.hashes, return_indices=True)
    views = min(here.tokens.shape[1], there.tokens.shape[1])
    patches = np.stack([_patches(here, mine, there, yours, view) for view in range(views)], axis=1)
    met = patches >= 0
    if not met.any():
        return None
    tokens = ranks(here.tokens[mine, :views].reshape(met.shape))
    others = ranks(there.tokens[yours, :views].reshape(len(yours), views, -1))

    def joint(by: int) -> Joint:
        facing = np.take_along_axis(np.roll(others, by, axis=0), np.maximum(patches, 0), axis=2)
        return Joint.of(tokens[met], facing[met])

    return {
        "images": int(met.any((1, 2)).sum()),
        "patches": int(met.sum()),
        "information": information(joint(0), [joint(by) for by in rolled(len(mine))]),
    }


def _patches(
    here: SampledImages, mine: NDArray[np.intp], there: SampledImages, yours: NDArray[np.intp], view: int
) -> NDArray[np.int64]:
    """`seen_in` for one view of the images `mine` of one sample, which are `yours` of the other."""
    height, width = here.tokens.shape[2:]
    other_height, other_width = there.tokens.shape[2:]
    return seen_in(
        here.crops[mine, view],
        here.flips[mine, view],
        there.crops[yours, view],
        there.flips[yours, view],
        (height, width),
        (other_height, other_width),
    )
