"""Compares two token stores or two codebooks: what changed from B to A in `inspect A --against B`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import Tokens
from ...shared.sources.keys import key_digests
from ...shared.tokens.codebook import TOKEN_FIELDS, Codebook
from ...shared.tokens.rows import ShardRows
from ...shared.tokens.store import TokenStore
from ..counting.count_table import Counter
from ..counting.sample import ImageSample
from ..counting.schema import code_usage
from ..counting.store import count_store
from .centroids import distances, nearest_others, spread
from .faults import Fault, find_difference, find_fault
from .shared_information import shared_information
from .warnings import InspectionWarning, difference_warning, fault_warning

# Tokens of A that are kept to be compared with those of B, not counting those of the rows around them.
_MOST_TOKENS = 8_000_000
# Boxes are float64, so that the same crop may be computed with a small error; a tenth of a pixel is the same crop.
_SAME_BOX = 0.1


@dataclass(frozen=True)
class _KeptRow:
    """One image of A."""

    tokens: Tokens
    """(3, V, H, W): of the image itself, and of the rows before and after it in its shard."""
    crops: NDArray[np.float64]
    """(V, 4)."""
    flips: NDArray[np.bool_]
    """(V,)."""


class KeptTokens(Counter):
    """Keeps the tokens of every n-th image of A, so that memory stays bounded, and a hash of every key."""

    def __init__(self, store: TokenStore):
        per_row = store.views * store.grid[0] * store.grid[1]
        self.step = max(-(-len(store) * per_row // _MOST_TOKENS), 1)
        self.key_hashes: list[NDArray[np.uint64]] = []
        self.rows: dict[str, _KeptRow] = {}
        self._seen = 0

    def add(self, rows: ShardRows) -> None:
        self.key_hashes.append(key_digests(rows.keys))
        for at in range(-self._seen % self.step, len(rows), self.step):
            # The neighbours of a shard's last row wrap around to its first.
            tokens = rows.tokens[[at, at - 1, (at + 1) % len(rows)]]
            # Copies, as a view would keep the whole shard in memory.
            self.rows[rows.keys[at]] = _KeptRow(tokens, rows.crops[at].copy(), rows.flips[at].copy())
        self._seen += len(rows)


class _TokenComparison(Counter):
    """Compares the kept tokens of A with those of B, shard by shard of B."""

    def __init__(self, kept: KeptTokens, comparable: bool):
        self.kept, self.comparable = kept, comparable
        self.key_hashes: list[NDArray[np.uint64]] = []
        self.images = self.views = self.other_views = self.equal_images = 0
        self.equal: NDArray[np.int64] | None = None
        self.differing: list[tuple[NDArray[Any], ...]] = []

    def add(self, rows: ShardRows) -> None:
        self.key_hashes.append(key_digests(rows.keys))
        if not self.comparable:
            return
        for at, key in enumerate(rows.keys):
            if key in self.kept.rows:
                self._compare(rows, at, self.kept.rows[key])

    def _compare(self, rows: ShardRows, at: int, kept: _KeptRow) -> None:
        views = min(len(kept.flips), rows.flips.shape[1])
        flips = kept.flips[:views]
        same = (np.abs(rows.crops[at, :views] - kept.crops[:views]) < _SAME_BOX).all(-1) & (
            rows.flips[at, :views] == flips
        )
        self.images += 1
        self.other_views += int((~same).sum())
        if not same.any():
            return
        right, stored = rows.tokens[at, :views][same], kept.tokens[:, :views][:, same]
        equal = right == stored[0]
        self.views += len(right)
        self.equal = equal.sum(0) if self.equal is None else self.equal + equal.sum(0)
        self.equal_images += int(equal.all())
        if not equal.all():
            # View by view, as images may differ in how many of their views are comparable.
            self.differing += [(right[view], *stored[:, view], flips[same][view]) for view in range(len(right))]

    def fault(self) -> Fault | None:
        """The known fault that explains the tokens that differ, if there is one."""
        if not self.differing:
            return None
        right, stored, before, after, flips = (np.array(part) for part in zip(*self.differing, strict=True))
        return find_fault(right[:, None], stored[:, None], before[:, None], after[:, None], flips[:, None])

    def result(self, positions: int) -> dict[str, Any] | None:
        """The result as JSON; None if no view was comparable. `positions` is H * W."""
        if self.equal is None:
            return None
        compared, equal = self.views * positions, int(self.equal.sum())
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
    store: TokenStore, statistics: Mapping[str, Any], sample: ImageSample, kept: KeptTokens, other: TokenStore
) -> tuple[dict[str, Any], list[InspectionWarning]]:
    """Compares `store`, of which `statistics`, `sample` and `kept` were collected before, with `other`.

    Returns what changed from `other` to `store` as JSON, and warnings about it.
    """
    notes = _not_comparable(store, other)
    same_codes = store.fingerprint == other.fingerprint
    comparison = _TokenComparison(kept, comparable=same_codes and store.grid == other.grid)
    other_sample = ImageSample(other)
    other_statistics = count_store(other, [comparison], other_sample)
    tokens = comparison.result(store.grid[0] * store.grid[1])
    if comparison.other_views:
        notes.append(f"tokens: {comparison.other_views:,} views of common images have another crop or flip there")
    shared = shared_information(sample.images(), other_sample.images())
    if shared is None:
        notes.append("codes of the same patches: no sampled view of one store shows a patch of the other one")
    counts, other_counts = (np.array(counted["counts"]) for counted in (statistics, other_statistics))
    report = {
        "path": str(other.path),
        "fingerprint": other.fingerprint,
        "same_codebook": same_codes,
        "k": other.k,
        "grid": list(other.grid),
        "not_compared": notes,
        "keys": _compare_keys(kept.key_hashes, comparison.key_hashes),
        "usage": {"here": statistics["usage"], "there": other_statistics["usage"]},
        "drift": drift(counts, other_counts) if same_codes else None,
        "neighbours": {"here": statistics["neighbours"], "there": other_statistics["neighbours"]},
        "quality": {"here": statistics["quality"], "there": other_statistics["quality"]},
        "shared_information": shared,
        "tokens": tokens,
    }
    return report, _warnings(comparison, tokens, str(other.path))


def _warnings(comparison: _TokenComparison, tokens: dict[str, Any] | None, other: str) -> list[InspectionWarning]:
    fault = comparison.fault()
    if fault:
        return [fault_warning(fault, comparison.images - comparison.equal_images, other)]
    difference = find_difference(tokens["share"]) if tokens else None
    return [difference_warning(difference, other)] if difference else []


def _not_comparable(store: TokenStore, other: TokenStore) -> list[str]:
    """Notes about parts that cannot be compared, with the reasons."""
    notes = []
    if store.fingerprint != other.fingerprint:
        fields = [name for name in TOKEN_FIELDS if store.codebook.get(name) != other.codebook.get(name)]
        why = f" (they differ in {', '.join(fields)})" if fields else ""
        notes.append(
            f"codes: {store.fingerprint[:12]} and {other.fingerprint[:12]} are two codebooks{why}, so that one number "
            "means two things; compare the codebooks with each other"
        )
    if store.grid != other.grid:
        notes.append(f"positions: the grid is {_by(store.grid)} here and {_by(other.grid)} there")
    return notes


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def _compare_keys(hashes: list[NDArray[np.uint64]], other_hashes: list[NDArray[np.uint64]]) -> dict[str, int]:
    here, there = (np.unique(np.concatenate([np.empty(0, np.uint64), *parts])) for parts in (hashes, other_hashes))
    common = len(np.intersect1d(here, there, assume_unique=True))
    return {"common": common, "only_here": len(here) - common, "only_there": len(there) - common}


def drift(counts: NDArray[np.int64], before: NDArray[np.int64]) -> dict[str, Any]:
    """How the usage of codes changed from counts `before` (K,) to `counts` (K,).

    Total variation is half the sum of absolute differences of shares; the Jensen-Shannon distance is the square root
    of the divergence in bits; both are 0 for equal usage and 1 for disjoint sets of codes.
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


def compare_codebooks(codebook: Codebook, other: Codebook, path: str) -> dict[str, Any]:
    """Matches the centroids of `codebook` with those of `other` (at `path`), and measures how far they moved."""
    fields = [name for name in TOKEN_FIELDS if codebook.description.get(name) != other.description.get(name)]
    imported = "imported" in (codebook.description | other.description)
    report: dict[str, Any] = {
        "path": path,
        "fingerprint": other.fingerprint,
        "same_codebook": codebook.fingerprint == other.fingerprint,
        "k": other.k,
        "not_compared": [f"{name}: it is {other.description.get(name)!r} there" for name in fields],
        "usage": None if imported else {"here": code_usage(codebook.counts), "there": code_usage(other.counts)},
        "centroids": None,
    }
    if codebook.centroids.shape[1] != other.centroids.shape[1]:
        return report
    if any(name in fields for name in ("architecture", "weights_sha256", "layer", "final_norm", "metric")):
        report["not_compared"].append("centroids: they belong to different features, which have no common distance")
        return report
    return {**report, "centroids": _match_centroids(codebook, other)}


def _match_centroids(codebook: Codebook, other: Codebook) -> dict[str, Any]:
    there = other.nearest(codebook.centroids, 1)[0][:, 0]
    here = codebook.nearest(other.centroids, 1)[0][:, 0]
    apart = distances(codebook.centroids, other.centroids[there])
    to_next = nearest_others(codebook)[1] if codebook.k > 1 else np.full(codebook.k, np.inf)
    mutual = here[there] == np.arange(codebook.k)
    return {
        "equal": int((apart == 0).sum()),
        "same_number": int((there == np.arange(codebook.k)).sum()),
        "mutual": int(mutual.sum()),
        # Farther from every centroid there than half way to the next one here: its cell is another one.
        "moved": int((apart > to_next / 2).sum()),
        "distance": spread(apart),
        "own_distance": spread(to_next) if codebook.k > 1 else None,
        "nearest": there.tolist(),
    }
