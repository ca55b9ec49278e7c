"""What a store's page shows: which images, which codes, and for each code which patches."""

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from ..shared.codebook import Codebook
from ..shared.console import Advance, progress
from ..shared.devices import choose_device, choose_workers
from ..shared.errors import DataError, FingerprintMismatch
from ..shared.images import ImageRecord, decode, read_bytes
from ..shared.randomness import generator
from ..shared.remote import is_remote
from ..shared.sources import SourceShard, open_source
from ..shared.token_rows import NO_LABEL, ShardRows
from ..shared.token_store import WEBDATASET, TokenStore
from ..shared.views import CropBox, ViewPolicy, replay
from .encoder import open_same_tower
from .extract import extract

_CANDIDATES = 16
_MOST_REENCODED = 256
_BATCH = 32


@dataclass(frozen=True, order=True)
class Place:
    """One view of one image of the store."""

    shard: str
    row: int
    view: int


@dataclass(frozen=True)
class Patch:
    """A patch of the store: `at` counts along the rows of its grid; its distance to its centroid where it is known."""

    place: Place
    at: int
    distance: float | None = None


class Pictures:
    """The pixels of a store's views: from the source of its images, or from the store where it holds them."""

    def __init__(self, store: TokenStore, images: str | None):
        """Raises DataError or UsageError where `images` cannot be opened or has no shard of the store."""
        self._store = store
        self._sources = _sources(store, images) if images else {}
        holds_them = store.storage == WEBDATASET and not is_remote(store.path)
        self.shards = list(self._sources) or (list(store.entries) if holds_them else [])
        """The shards whose images are at hand, by name."""

    def record(self, shard: str, rows: ShardRows, row: int) -> ImageRecord:
        """Where the image of one row lies."""
        if not self._sources:
            return self._store.images_of(shard, rows)[row]
        root = Path(self._sources[shard].root)
        path = root / rows.paths[row] if rows.paths[row] else root
        label = int(rows.labels[row])
        where = int(rows.offsets[row]), int(rows.lengths[row])
        return ImageRecord(rows.keys[row], path, *where, None if label == NO_LABEL else label)

    def view(self, shard: str, rows: ShardRows, row: int, view: int, side: int) -> Image.Image:
        """What the tower saw of an image, at `side` x `side` pixels; DataError if its bytes are not those encoded."""
        record = self.record(shard, rows, row)
        content = read_bytes(record)
        if zlib.crc32(content) != rows.crc32[row]:
            raise DataError(
                f"{record.path}: image {record.key!r} is not the one that was encoded (its CRC32 differs); "
                "give the images that the tokens were made of."
            )
        image = decode(content, f"{record.path}: image {record.key!r}")
        return replay(image, CropBox(*rows.crops[row, view]), bool(rows.flips[row, view]), side)


def _sources(store: TokenStore, images: str) -> dict[str, SourceShard]:
    sources = {shard.name: shard for shard in open_source(images) if shard.name in store.entries}
    if not sources:
        raise DataError(f"--images {images} has none of the shards of {store.path}; give what its tokens were made of.")
    remote = next((shard.root for shard in sources.values() if shard.is_remote), None)
    if remote:
        raise DataError(f"{remote} is remote; a page needs its images here, download some of the tars first.")
    return sources


def choose_images(store: TokenStore, shards: Sequence[str], count: int, seed: int) -> list[Place]:
    """`count` views of as many images of `shards`, uniform over both and drawn by `seed`, in the store's order."""
    sizes = [store.entries[name]["images"] for name in shards]
    random = generator(seed, "page images")
    picked = np.sort(random.choice(sum(sizes), min(count, sum(sizes)), replace=False))
    views = random.integers(0, store.views, len(picked))
    ends = np.cumsum(sizes)
    of = np.searchsorted(ends, picked, side="right")
    return [
        Place(shards[shard], int(image - (ends[shard] - sizes[shard])), int(view))
        for shard, image, view in zip(of, picked, views, strict=True)
    ]


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
    pictures: Pictures,
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
    images = _images_of(candidates, choose_images(store, pictures.shards, _MOST_REENCODED, seed))
    near: dict[int, list[Patch]] = defaultdict(list)
    compared = equal = 0
    with progress("measuring distances", len(images)) as advance:
        for name, rows, chosen in by_shard(store, images):
            records = [pictures.record(name, rows, row) for row in chosen]
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


def by_shard(store: TokenStore, images: Iterable[tuple[str, int]]) -> Iterator[tuple[str, ShardRows, list[int]]]:
    """(shard, its rows, which rows of it) of images, each shard read once."""
    grouped: dict[str, list[int]] = defaultdict(list)
    for shard, row in sorted(set(images)):
        grouped[shard].append(row)
    for shard, chosen in grouped.items():
        yield shard, store.read_rows(shard), chosen


def _images_of(candidates: dict[int, list[Patch]], others: list[Place]) -> list[tuple[str, int]]:
    """(shard, row) of the first image of every code, then of the second, and so on, then of `others`."""
    turns = [patch.place for turn in zip_longest(*candidates.values()) for patch in turn if patch]
    return list(dict.fromkeys((place.shard, place.row) for place in [*turns, *others]))[:_MOST_REENCODED]


def _nearest(image: Place, rows: ShardRows, code: int, stored: np.ndarray, again: np.ndarray, far: np.ndarray) -> Patch:
    """The patch of one image, in any of its views, that is nearest the centroid of `code`."""
    at = int(np.where((stored == code) & (again == code), far, np.inf).argmin())
    view, patch = divmod(at, rows.tokens[0, 0].size)
    return Patch(Place(image.shard, image.row, view), patch, float(max(far[at], 0.0)) ** 0.5)
