"""Measures how stable the tokens of a sample of images are, and what they lose: inspect --codebook --images."""

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from ...shared.errors import DataError
from ...shared.images.decode import decode
from ...shared.images.views import CropBox, ViewPolicy
from ...shared.runtime.console import progress
from ...shared.sources.records import read_encoded
from ...shared.tokens.stored_views import Place, by_shard, choose_images
from ..counting.information import rolled, score
from ..counting.schema import Agreement, agreement
from ..tokenizers.base import Tokenizer
from .pictures import StorePictures
from .reconstruction import Reconstruction, ReconstructionMeter
from .variants import StoredView, Tokens, Variants

_IMAGES_AT_ONCE = 8


class Stability(Agreement):
    """How often a patch keeps its token. `chance` is for patches of two images at the same places."""

    adjusted: float | None
    """(share - chance) / (1 - chance). Coarse codes are more stable than fine ones, so that stability falls with K also
    after chance was subtracted."""


class PictureQuality(TypedDict):
    """Figures for which images were encoded again: one view each of a seeded sample of images (`variants.Variants`)."""

    images: int
    as_stored: float
    """Share of the tokens that equal the stored ones; below 1 by rounding alone, 1 % at most."""
    flips: Stability
    """Of a view, and of the mirrored view at the same place in the picture."""
    crops: Stability | None
    """Of two crops that are shifted against each other by a quarter of the grid, where their patches have the same
    pixels: what surroundings alone change. None where a quarter of the grid is no whole number of patches of whole
    pixels, as in a grid of one patch."""
    scales: Stability | None
    """Of a view, and of the same view enlarged by that quarter (1.25 times), where the centre of its patch lies in a
    patch of the enlarged one. None where `crops` is."""
    reconstruction: Reconstruction


def measure(pictures: StorePictures, count: int, seed: int) -> PictureQuality:
    """Encodes `count` images of a store again, drawn by `seed`, four views of each.

    Raises:
        DataError: an image cannot be read or changed since it was encoded, or a feature is not finite.
        FingerprintMismatch: the tower is not that of the codebook.
    """
    store, tokenizer = pictures.store, pictures.tokenizer
    variants = Variants(tokenizer.preprocess, tokenizer.grid, ViewPolicy.from_json(store.view))
    places = choose_images(store, pictures.views.shards, count, seed)
    meter, tokens, stored = ReconstructionMeter(tokenizer), list[Tokens](), list[Tokens]()
    with progress("measuring stability", len(places)) as advance:
        for pixels, own in _batches(pictures, variants, places):
            again, features, distances = _encoded(tokenizer, pixels)
            meter.add(features[:, 0].reshape(-1, tokenizer.dim), distances[:, 0].reshape(-1))
            tokens.append(again)
            stored.append(own)
            advance(len(own))
    everything = np.concatenate(tokens)
    return {
        "images": len(everything),
        "as_stored": float((everything[:, 0] == np.concatenate(stored)).mean()),
        "flips": stability(*variants.mirrored(everything)),
        "crops": stability(*variants.shifted(everything)) if variants.is_shiftable else None,
        "scales": stability(*variants.rescaled(everything)) if variants.is_shiftable else None,
        "reconstruction": meter.result(),
    }


def stability(first: Tokens, second: Tokens) -> Stability:
    """How often two tokens (n, p) of the same patch of n images are equal."""
    equal = int((first == second).sum())
    found = score(
        equal / max(first.size, 1),
        (float((first == np.roll(second, by, axis=0)).mean()) for by in rolled(len(first))),
    )
    return {**agreement(equal, first.size, found["chance"]), "adjusted": found["adjusted"]}


def _batches(
    pictures: StorePictures, variants: Variants, places: list[Place]
) -> Iterator[tuple[NDArray[np.uint8], Tokens]]:
    """Yields the pixels (n, 4, 3, S, S) and the stored tokens (n, H, W) of a few views at a time."""
    waiting: list[tuple[NDArray[np.uint8], Tokens]] = []
    for view in _views(pictures, variants, places):
        waiting.append(view)
        if len(waiting) == _IMAGES_AT_ONCE:
            yield _stacked(waiting)
            waiting = []
    if waiting:
        yield _stacked(waiting)


def _stacked(
    views: list[tuple[NDArray[np.uint8], Tokens]],
) -> tuple[NDArray[np.uint8], Tokens]:
    pixels, tokens = zip(*views, strict=True)
    return np.stack(pixels), np.stack(tokens)


def _views(
    pictures: StorePictures, variants: Variants, places: list[Place]
) -> Iterator[tuple[NDArray[np.uint8], Tokens]]:
    view_of = {(place.shard, place.row): place.view for place in places}
    for shard, rows, indices in by_shard(pictures.store, view_of):
        for row in indices:
            number = view_of[shard, row]
            record = pictures.views.record(shard, rows, row)
            name = f"{record.path}: image {record.key!r}"
            image = decode(read_encoded(record, rows.crc32[row]), name, record.max_pixels)
            stored = StoredView(number, CropBox(*rows.crops[row, number]), bool(rows.flips[row, number]))
            try:
                pixels = variants.pixels(image, stored)
            except ValueError as error:
                raise DataError(
                    f"{pictures.store.path}: view {number} of image {record.key!r} lies outside of the image "
                    f"({error}); encode its shard again."
                ) from None
            yield pixels, rows.tokens[row, number]


def _encoded(
    tokenizer: Tokenizer, pixels: NDArray[np.uint8]
) -> tuple[Tokens, NDArray[np.float32], NDArray[np.float32]]:
    """Pixels (n, 4, 3, S, S) -> tokens (n, 4, H, W), features (n, 4, H * W, dim), distances (n, 4, H * W)."""
    features = tokenizer.features(torch.from_numpy(pixels).flatten(0, 1))
    if not torch.isfinite(features).all():
        raise DataError(
            "The tower gives features with NaN or infinity; use float32 or another layer, or check its weights."
        )
    features = normalize(features, dim=-1) if tokenizer.unit_length else features
    array: NDArray[np.float32] = features.cpu().contiguous().numpy()
    tokens, distances = tokenizer.assign(array.reshape(-1, tokenizer.dim))
    lead = pixels.shape[:2]
    return tokens.reshape(*lead, *tokenizer.grid), array.reshape(*lead, -1, tokenizer.dim), distances.reshape(*lead, -1)
