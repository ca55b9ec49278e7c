"""What a store's page shows: which images, which codes, and for each code which patches."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from ...shared.errors import FingerprintMismatch
from ...shared.images.views import ViewPolicy
from ...shared.randomness import generator
from ...shared.runtime.console import Advance, progress
from ...shared.runtime.devices import choose_device, choose_workers
from ...shared.tokens.codebook import Codebook
from ...shared.tokens.rows import ShardRows
from ...shared.tokens.store import TokenStore
from ...shared.tokens.stored_views import Place, StoredViews, by_shard, choose_images
from ..tokenizers.kclip import open_same_tower
from ..towers.features import extract

_CANDIDATES = 16
_MOST_REENCODED = 256
_BATCH = 32


@dataclass(frozen=True)
class Patch:
    """A patch of the store: `at` counts along the rows of its grid; its distance to its centroid where it is known."""

    place: Place
    at: int
    distance: float | None = None


def choose_codes(counts: np.ndarray, many: int) -> list[int]:
    """At most `many` codes that are used, most used first: a quarter from the top, one from the bottom, the rest
    evenly from between."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    if len(order) <= many:
        return order.tolist()
    ends = many // 4
    between = np.linspace(ends, len(order) - ends - 1, many - 2 * ends).round().astype(int)
    return [*order[:ends].tolist(), *order[between].tolist(), *order[len(order) - ends :].tolist()]


def sample_patches(
    store: TokenStore, shards: Iterable[str], codes: Sequence[int], seed: int, advance: Advance
) -> dict[int, list[Patch]]:
    """For each of `codes` some patches that have it, at most one an image, drawn uniformly from all of `shards`."""
    wanted = np.zeros(store.k, dtype=bool)
    wanted[list(codes)] = True
    best: dict[int, list[tuple[float, Patch]]] = defaultdict(list)
    for name in shards:
        tokens = store.read_rows(name).tokens
        _, views, height, width = tokens.shape
        flat = tokens.reshape(-1)
        at = np.flatnonzero(wanted[flat])
        draws = generator(seed, "page patches", name).random(len(at))
        at, draws = at[np.argsort(draws)], np.sort(draws)
        image = at // (views * height * width)
        _, first = np.unique(flat[at] * np.int64(len(tokens)) + image, return_index=True)
        for place in np.sort(first):
            kept = best[int(flat[at[place]])]
            view = int(at[place] // (height * width) % views)
            kept.append(
                (float(draws[place]), Patch(Place(name, int(image[place]), view), int(at[place] % (height * width))))
            )
        for code, kept in best.items():
            best[code] = sorted(kept, key=lambda pair: pair[0])[:_CANDIDATES]
        advance(1)
    return {code: [patch for _, patch in best[code]] for code in codes}


@dataclass(frozen=True)
class Nearest:
    """The patches nearest their centroids among some images that went through the tower again."""

    patches: dict[int, list[Patch]]
    images: int
    equal: float
    """Share of their tokens that are those of the store."""


def nearest_patches(
    store: TokenStore,
    views: StoredViews,
    book: Codebook,
    candidates: dict[int, list[Patch]],
    many: int,
    seed: int,
    tower: str | None,
    device: str,
) -> Nearest:
    """Puts at most 256 images, those of `candidates` first, through the tower again: for each code its `many` nearest
    patches.

    Raises FingerprintMismatch if codebook or tower are not those of the store.
    """
    refuse_other_codebook(store, book)
    opened = open_same_tower(book, tower, choose_device(device))
    policy, metric = ViewPolicy.from_json(store.view), book.description["metric"]
    workers = choose_workers(None, opened.device.type)
    images = _images_of(candidates, choose_images(store, views.shards, _MOST_REENCODED, seed))
    near: dict[int, list[Patch]] = defaultdict(list)
    compared = equal = 0
    with progress("measuring distances", len(images)) as advance:
        for name, rows, chosen in by_shard(store, images):
            records = [views.record(name, rows, row) for row in chosen]
            done = iter(chosen)
            for batch in extract(opened, records, policy, _BATCH, workers, metric):
                tokens, distances = book.assign(batch.features.reshape(-1, opened.dim))
                shape = (len(batch.records), -1)
                for again, far in zip(tokens.reshape(shape), distances.reshape(shape), strict=True):
                    row = next(done)
                    stored = rows.tokens[row].reshape(-1)
                    compared, equal = compared + len(stored), equal + int((stored == again).sum())
                    for code in candidates.keys() & set(stored[stored == again].tolist()):
                        near[code].append(_nearest(Place(name, row, 0), rows, code, stored, again, far))
                advance(len(batch.records))
    patches = {code: sorted(found, key=lambda patch: patch.distance)[:many] for code, found in near.items()}
    return Nearest({code: patches.get(code, []) for code in candidates}, len(images), equal / max(compared, 1))


def refuse_other_codebook(store: TokenStore, book: Codebook) -> None:
    """FingerprintMismatch if `book` did not make the tokens of `store`."""
    if book.fingerprint != store.fingerprint:
        raise FingerprintMismatch(
            f"{store.path} was made with codebook {store.fingerprint[:12]}, not {book.fingerprint[:12]}."
        )


def _images_of(candidates: dict[int, list[Patch]], others: list[Place]) -> list[tuple[str, int]]:
    """(shard, row) of the first image of every code, then of the second, and so on, then of `others`."""
    turns = [patch.place for turn in zip_longest(*candidates.values()) for patch in turn if patch]
    return list(dict.fromkeys((place.shard, place.row) for place in [*turns, *others]))[:_MOST_REENCODED]


def _nearest(image: Place, rows: ShardRows, code: int, stored: np.ndarray, again: np.ndarray, far: np.ndarray) -> Patch:
    """The patch of one image, in any of its views, that is nearest the centroid of `code`."""
    at = int(np.where((stored == code) & (again == code), far, np.inf).argmin())
    view, patch = divmod(at, rows.tokens[0, 0].size)
    return Patch(Place(image.shard, image.row, view), patch, float(max(far[at], 0.0)) ** 0.5)
