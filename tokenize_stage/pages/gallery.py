"""Chooses what the page of a store shows: images, codes, and patches of each code."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import Tokens
from ...shared.images.views import ViewPolicy
from ...shared.randomness import generator
from ...shared.runtime.console import Advance, progress
from ...shared.runtime.devices import choose_workers
from ...shared.tokens.codebook import INNER_PRODUCT
from ...shared.tokens.rows import ShardRows
from ...shared.tokens.store import TokenStore
from ...shared.tokens.stored_views import Place, StoredViews, by_shard, choose_images
from ..quality.pictures import refuse_other_codebook
from ..tokenizers.base import Tokenizer
from ..towers.features import extract

_CANDIDATES = 16
_MOST_REENCODED = 256
_BATCH = 32


@dataclass(frozen=True)
class Patch:
    """A patch of the store: `at` counts row by row through the grid."""

    place: Place
    at: int
    match: float | None = None
    """How well it matches its code: its Euclidean distance to the centroid, or where the metric is an inner product its
    logit (inner product plus bias); None where it was not computed."""


def choose_codes(counts: NDArray[np.int64], most: int) -> list[int]:
    """At most `most` used codes, most used first, from counts (K,).

    A quarter are the most used codes, a quarter the least used ones, and the rest are spread evenly between them.
    """
    order = np.argsort(-counts, kind="stable")
    codes: list[int] = order[counts[order] > 0].tolist()
    if len(codes) <= most:
        return codes
    ends = most // 4
    between = np.linspace(ends, len(codes) - ends - 1, most - 2 * ends).round().astype(int)
    return [*codes[:ends], *(codes[index] for index in between), *codes[len(codes) - ends :]]


def sample_patches(
    store: TokenStore, shards: Iterable[str], codes: Sequence[int], seed: int, advance: Advance
) -> dict[int, list[Patch]]:
    """For each of `codes` at most 16 patches that have it, one per image at most, drawn uniformly from `shards`."""
    wanted = np.zeros(store.k, dtype=bool)
    wanted[list(codes)] = True
    drawn: dict[int, list[tuple[float, Patch]]] = defaultdict(list)
    for name in shards:
        tokens = store.read_rows(name).tokens
        _, views, height, width = tokens.shape
        flat = tokens.reshape(-1)
        at = np.flatnonzero(wanted[flat])
        draws = generator(seed, "page patches", name).random(len(at))
        at, draws = at[np.argsort(draws)], np.sort(draws)
        image = at // (views * height * width)
        _, first = np.unique(flat[at] * np.int64(len(tokens)) + image, return_index=True)
        for index in np.sort(first):
            view = int(at[index] // (height * width) % views)
            patch = Patch(Place(name, int(image[index]), view), int(at[index] % (height * width)))
            drawn[int(flat[at[index]])].append((float(draws[index]), patch))
        for code, patches in drawn.items():
            drawn[code] = sorted(patches, key=lambda pair: pair[0])[:_CANDIDATES]
        advance(1)
    return {code: [patch for _, patch in drawn[code]] for code in codes}


@dataclass(frozen=True)
class Nearest:
    """The patches nearest their centroids among some images that went through the tower again."""

    patches: dict[int, list[Patch]]
    images: int
    equal: float
    """Share of their tokens that are equal to the stored ones."""
    by_logit: bool
    """Whether `Patch.match` is a logit, the larger the nearer, and not a distance."""


def nearest_patches(
    store: TokenStore,
    views: StoredViews,
    tokenizer: Tokenizer,
    candidates: dict[int, list[Patch]],
    most: int,
    seed: int,
) -> Nearest:
    """Encodes at most 256 images again, those of `candidates` first, and finds the `most` nearest patches of each code.

    Raises FingerprintMismatch if the tokenizer did not make the tokens of the store.
    """
    refuse_other_codebook(store, tokenizer.fingerprint)
    by_logit = tokenizer.description.get("metric") == INNER_PRODUCT
    policy, workers = ViewPolicy.from_json(store.view), choose_workers(None, tokenizer.device.type)
    images = _images_of(candidates, choose_images(store, views.shards, _MOST_REENCODED, seed))
    patches: dict[int, list[tuple[float, Patch]]] = defaultdict(list)
    compared = equal = 0
    with progress("measuring distances", len(images)) as advance:
        for name, rows, indices in by_shard(store, images):
            records = [views.record(name, rows, row) for row in indices]
            remaining = iter(indices)
            for batch in extract(tokenizer, records, policy, _BATCH, workers, unit_length=tokenizer.unit_length):
                tokens, distances = tokenizer.assign(batch.values.reshape(-1, tokenizer.dim))
                shape = (len(batch.records), -1)
                for again, squared in zip(tokens.reshape(shape), distances.reshape(shape), strict=True):
                    row = next(remaining)
                    stored = rows.tokens[row].reshape(-1)
                    compared, equal = compared + len(stored), equal + int((stored == again).sum())
                    for code in candidates.keys() & set(stored[stored == again].tolist()):
                        nearest = _nearest(Place(name, row, 0), rows, code, stored, again, squared, by_logit)
                        patches[code].append(nearest)
                advance(len(batch.records))
    closest = {code: [patch for _, patch in sorted(pairs, key=_distance)[:most]] for code, pairs in patches.items()}
    share = equal / max(compared, 1)
    return Nearest({code: closest.get(code, []) for code in candidates}, len(images), share, by_logit)


def _images_of(candidates: dict[int, list[Patch]], others: list[Place]) -> list[tuple[str, int]]:
    """(shard, row) of the first image of every code, then of the second, and so on, then of `others`."""
    turns = [patch.place for turn in zip_longest(*candidates.values()) for patch in turn if patch]
    return list(dict.fromkeys((place.shard, place.row) for place in [*turns, *others]))[:_MOST_REENCODED]


def _distance(pair: tuple[float, Patch]) -> float:
    return pair[0]


def _nearest(
    image: Place,
    rows: ShardRows,
    code: int,
    stored: Tokens,
    again: Tokens,
    squared: NDArray[Any],
    by_logit: bool,
) -> tuple[float, Patch]:
    """(order, patch) of the patch of one image, in any of its views, that is nearest the centroid of `code`.

    `stored` and `again` are the image's tokens (V * H * W,), `squared` their squared distances, or negative logits.
    """
    at = int(np.where((stored == code) & (again == code), squared, np.inf).argmin())
    view, patch = divmod(at, rows.tokens[0, 0].size)
    order = float(squared[at])
    match = -order if by_logit else max(order, 0.0) ** 0.5
    return order, Patch(Place(image.shard, image.row, view), patch, match)
