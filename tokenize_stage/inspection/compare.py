"""inspect A --against B: what changed from one token store or codebook (B) to another (A)."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np

from ...shared.tokens.code_usage import usage
from ...shared.tokens.codebook import TOKEN_FIELDS, Codebook
from ...shared.tokens.rows import ShardRows
from ...shared.tokens.store import TokenStore
from .centroids import distances, nearest_others, spread
from .counting import Counter, count_store
from .faults import fault_of
from .warnings import Suspicion, suspect_difference, suspect_fault

# Tokens of A that are kept to be compared with B's, with those of the rows around them.
_MOST_TOKENS = 8_000_000
# Boxes are stored as float64, computed alike; a tenth of a pixel is no other crop.
_SAME_BOX = 0.1


class Kept(Counter):
    """The tokens of a part of the images of A: every n-th, so that memory stays bounded; and the names of all."""

    def __init__(self, store: TokenStore):
        a_row = store.views * store.grid[0] * store.grid[1]
        self.step = max(-(-len(store) * a_row // _MOST_TOKENS), 1)
        self.names: list[np.ndarray] = []
        self.rows: dict[str, tuple[np.ndarray, ...]] = {}
        self._seen = 0

    def add(self, rows: ShardRows) -> None:
        self.names.append(_hashes(rows))
        for at in range(-self._seen % self.step, len(rows), self.step):
            # The rows around the end of a shard are its first and last.
            around = rows.tokens[[at, at - 1, (at + 1) % len(rows)]]
            # Copies, as a view would keep the whole shard in memory.
            self.rows[rows.keys[at]] = (around, rows.crops[at].copy(), rows.flips[at].copy())
        self._seen += len(rows)


class _Compared(Counter):
    """Compares the tokens that were kept of A with those of B, told shard by shard."""

    def __init__(self, kept: Kept, comparable: bool):
        self.kept, self.comparable = kept, comparable
        self.names: list[np.ndarray] = []
        self.images = self.views = self.other_views = self.equal_images = 0
        self.equal: np.ndarray | None = None
        self.differing: list[tuple[np.ndarray, ...]] = []

    def add(self, rows: ShardRows) -> None:
        self.names.append(_hashes(rows))
        if not self.comparable:
            return
        for at, key in enumerate(rows.keys):
            if key in self.kept.rows:
                self._compare(rows, at, *self.kept.rows[key])

    def _compare(self, rows: ShardRows, at: int, around: np.ndarray, crops: np.ndarray, flips: np.ndarray) -> None:
        views = min(len(flips), rows.flips.shape[1])
        same = (np.abs(rows.crops[at, :views] - crops[:views]) < _SAME_BOX).all(-1) & (
            rows.flips[at, :views] == flips[:views]
        )
        self.images += 1
        self.other_views += int((~same).sum())
        if not same.any():
            return
        right, stored = rows.tokens[at, :views][same], around[:, :views][:, same]
        equal = right == stored[0]
        self.views += len(right)
        self.equal = equal.sum(0) if self.equal is None else self.equal + equal.sum(0)
        self.equal_images += int(equal.all())
        if not equal.all():
            # A view at a time, as images may have different numbers of views that are comparable.
            self.differing += [(right[view], *stored[:, view], flips[:views][same][view]) for view in range(len(right))]

    def fault(self) -> tuple[str, dict[str, float]] | None:
        if not self.differing:
            return None
        *grids, flips = (np.array(part) for part in zip(*self.differing, strict=True))
        return fault_of(*(grid[:, None] for grid in grids), flips[:, None])

    def figures(self, places: int) -> dict[str, Any] | None:
        if self.equal is None:
            return None
        compared, equal = self.views * places, int(self.equal.sum())
        return {
            "images": self.images,
            "sampled_every": self.kept.step,
            "equal_images": self.equal_images,
            "views": self.views,
            "views_with_other_crop_or_flip": self.other_views,
            "compared": compared,
            "equal": equal,
            "share": equal / compared,
            "share_by_position": (self.equal / self.views).tolist(),
        }


def compare_stores(
    store: TokenStore, figures: Mapping[str, Any], kept: Kept, other: TokenStore
) -> tuple[dict[str, Any], list[Suspicion]]:
    """What changed from `other` to `store`, whose figures and kept tokens are given, and what is suspicious in it."""
    notes = _not_comparable(store, other)
    same_codes = store.fingerprint == other.fingerprint
    compared = _Compared(kept, comparable=same_codes and store.grid == other.grid)
    theirs = count_store(other, [compared])
    places = store.grid[0] * store.grid[1]
    tokens = compared.figures(places)
    if compared.other_views:
        notes.append(f"tokens: {compared.other_views:,} views of common images have another crop or flip there")
    found = {
        "path": str(other.path),
        "fingerprint": other.fingerprint,
        "same_codebook": same_codes,
        "k": other.k,
        "grid": list(other.grid),
        "not_compared": notes,
        "keys": _keys(kept.names, compared.names),
        "usage": {"here": figures["usage"], "there": theirs["usage"]},
        "drift": drift(np.array(figures["counts"]), np.array(theirs["counts"])) if same_codes else None,
        "neighbours": {"here": figures["neighbours"], "there": theirs["neighbours"]},
        "tokens": tokens,
    }
    return found, _suspicions(compared, tokens, other)


def _suspicions(compared: _Compared, tokens: dict[str, Any] | None, other: TokenStore) -> list[Suspicion]:
    fault, images = compared.fault(), compared.images - compared.equal_images
    if fault:
        return [suspect_fault(*fault, images, str(other.path))]
    return suspect_difference(tokens, str(other.path)) if tokens else []


def _not_comparable(store: TokenStore, other: TokenStore) -> list[str]:
    """Why what is not compared is not."""
    notes = []
    if store.fingerprint != other.fingerprint:
        fields = [name for name in TOKEN_FIELDS if store.codebook.get(name) != other.codebook.get(name)]
        why = f" (they differ in {', '.join(fields)})" if fields else ""
        notes.append(
            f"codes: {store.fingerprint[:12]} and {other.fingerprint[:12]} are two codebooks{why}, so that one number "
            "means two things; compare the codebooks with each other"
        )
    if store.grid != other.grid:
        notes.append(f"places: the grid is {_by(store.grid)} here and {_by(other.grid)} there")
    return notes


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def _hashes(rows: ShardRows) -> np.ndarray:
    """8 bytes for each key, (n,) uint64: all keys of a large store as text would fill memory."""
    return np.array([int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) for key in rows.keys], np.uint64)


def _keys(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, int]:
    here, there = (np.unique(np.concatenate([np.empty(0, np.uint64), *parts])) for parts in (ours, theirs))
    common = len(np.intersect1d(here, there, assume_unique=True))
    return {"common": common, "only_here": len(here) - common, "only_there": len(there) - common}


def drift(counts: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """How the usage of codes changed from counts `before` (K,) to `counts` (K,).

    Total variation is half the sum of absolute differences of shares; the Jensen-Shannon distance is the square root
    of the divergence in bits; both are 0 for equal usage and 1 for codes that have nothing in common.
    """
    p, q = (part / max(part.sum(), 1) for part in (counts, before))
    middle = (p + q) / 2
    bits = sum(float((part[part > 0] * np.log2(part[part > 0] / middle[part > 0])).sum()) for part in (p, q)) / 2
    return {
        "total_variation": float(np.abs(p - q).sum() / 2),
        "jensen_shannon": max(bits, 0.0) ** 0.5,
        "appeared": np.flatnonzero((counts > 0) & (before == 0)).tolist(),
        "vanished": np.flatnonzero((counts == 0) & (before > 0)).tolist(),
    }


def compare_codebooks(book: Codebook, other: Codebook, path: str) -> dict[str, Any]:
    """Which centroids of `book` are which of `other` (at `path`), and how far they are apart."""
    fields = [name for name in TOKEN_FIELDS if book.description.get(name) != other.description.get(name)]
    found: dict[str, Any] = {
        "path": path,
        "fingerprint": other.fingerprint,
        "same_codebook": book.fingerprint == other.fingerprint,
        "k": other.k,
        "not_compared": [f"{name}: it is {other.description.get(name)!r} there" for name in fields],
        "usage": None if "imported" in (book.description | other.description) else _both_usages(book, other),
        "centroids": None,
    }
    if book.centroids.shape[1] != other.centroids.shape[1]:
        return found
    if any(name in fields for name in ("architecture", "weights_sha256", "layer", "final_norm", "metric")):
        found["not_compared"].append("centroids: features of two kinds have no distance from each other")
        return found
    return {**found, "centroids": _matched(book, other)}


def _both_usages(book: Codebook, other: Codebook) -> dict[str, Any]:
    return {"here": usage(book.counts), "there": usage(other.counts)}


def _matched(book: Codebook, other: Codebook) -> dict[str, Any]:
    there = other.nearest(book.centroids, 1)[0][:, 0]
    here = book.nearest(other.centroids, 1)[0][:, 0]
    apart = distances(book.centroids, other.centroids[there])
    own = nearest_others(book)[1] if book.k > 1 else np.full(book.k, np.inf)
    mutual = here[there] == np.arange(book.k)
    return {
        "equal": int((apart == 0).sum()),
        "same_number": int((there == np.arange(book.k)).sum()),
        "mutual": int(mutual.sum()),
        # Farther from every centroid there than half way to the next one here: its cell is another one.
        "moved": int((apart > own / 2).sum()),
        "distance": spread(apart),
        "own_distance": spread(own) if book.k > 1 else None,
        "nearest": there.tolist(),
    }
