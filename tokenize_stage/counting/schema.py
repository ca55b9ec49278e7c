"""The schema of `mapet tokenize inspect --json` for a token store, and the arithmetic of its statistics.

The report of a store is {kind: "token store", path, fingerprint, codebook, k, grid, shards, storage, bytes, skipped,
view, **StoreStatistics, warnings: [warnings.InspectionWarning]}, with --key also `image`, with --against also
`against`. All values are plain JSON; a share of nothing is None, never NaN.
"""

from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from ...shared.tokens.code_usage import usage
from .quality import Quality

_MOST_LISTED = 10
_COVERED_SHARES = (0.5, 0.9, 0.99)


class Agreement(TypedDict):
    """How often two tokens are the same code."""

    pairs: int
    equal: int
    share: float | None
    """equal / pairs."""
    chance: float | None
    """The share expected of two unrelated tokens."""


class Usage(TypedDict):
    """How evenly codes are used (`shared.tokens.code_usage`)."""

    codes: int
    used: int
    dead: int
    entropy_bits: float
    perplexity: float


class Cover(TypedDict):
    """The smallest number of codes that together make up `share` of all tokens."""

    share: float
    codes: int
    of_k: float
    """codes / K."""


class Positions(TypedDict):
    """One value per position of the grid, row by row (H lists of W), over all images and views."""

    perplexity: list[list[float]]
    entropy_bits: list[list[float]]
    used: list[list[int]]
    top_code: list[list[int]]
    """The most used code there (the lowest of several)."""
    top_share: list[list[float]]
    """Its share of the tokens there."""


class Neighbours(TypedDict):
    """Two patches of one view; `chance` is for two views drawn at random, at the same two positions."""

    horizontal: Agreement
    """Side by side."""
    vertical: Agreement
    """One above the other."""
    anywhere: Agreement
    """All pairs of positions."""


class Supposition(TypedDict):
    """How well overlapping views of a sample of images would agree if a certain fault were undone."""

    images: int
    pairs: int
    equal: int
    share: float
    chance: float
    """The same patches with the second view taken from another image: what the position in the grid alone gives."""
    sigmas: float
    """By how many standard errors (over images) share - chance exceeds that of the tokens as stored."""


class Overlaps(TypedDict):
    """Two views of one image: patches of the earlier view whose centre lies in the later one, by crop and flip."""

    view_pairs: int
    """Pairs of views of one image that have such a patch."""
    all: Agreement
    same_flip: Agreement
    """Both views are mirrored, or neither is."""
    other_flip: Agreement
    """One of the two is mirrored."""
    supposing: dict[str, Supposition]
    """By fault: as-stored; next, previous (tokens of the image after, before); mirrored; flips-ignored (mirrored views
    only); transposed (rows and columns swapped)."""


class Labels(TypedDict):
    """What codes say about the class of their image, over the tokens of all labelled images."""

    classes: int
    images: int
    tokens: int
    class_entropy_bits: float
    code_entropy_bits: float
    mutual_information_bits: float | None
    """None where classes x K exceeds 67 million, which is too much to count in memory."""
    nmi: float | None
    """Normalised mutual information: mutual information / mean of the two entropies."""
    nmi_by_offset: dict[str, float | None]
    """The same with the labels of the images that many rows further on in the shard (wrapping around its end), over
    every n-th shard, about 8 million tokens. A shift by one image would move the value of "0" to "-1" or "1"; the other
    offsets show what chance gives. Empty where it would take too much memory."""


class CodeStatistics(TypedDict):
    """How often each code is used."""

    counts: list[int]
    """Of each of the K codes."""
    usage: Usage
    coverage: list[Cover]
    """For 50, 90 and 99 % of the tokens."""
    most_used: list[list[int]]
    """[code, count], at most ten."""
    least_used: list[list[int]]
    """The same for the codes that are used at all, the rarest first."""
    dead_codes: list[int]


class StoreStatistics(CodeStatistics):
    """Everything that is counted in one pass over a store."""

    images: int
    views: int
    tokens: int
    labelled: int
    """Images that have a label."""
    positions: Positions
    same_place: Agreement
    """Two different views drawn at random, at the same position; `chance` is for any two positions."""
    neighbours: Neighbours
    overlaps: Overlaps | None
    """None where one view of each image is stored."""
    labels: Labels | None
    """None where no image has a label."""
    quality: Quality


def code_statistics(counts: NDArray[np.int64]) -> CodeStatistics:
    """The usage of codes, from how many tokens each has (K,)."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    ranked = [[int(code), int(counts[code])] for code in order]
    covered = np.cumsum(counts[order])
    needed = [int(np.searchsorted(covered, share * covered[-1])) + 1 if len(order) else 0 for share in _COVERED_SHARES]
    return {
        "counts": counts.tolist(),
        "usage": code_usage(counts),
        "coverage": [
            {"share": share, "codes": codes, "of_k": codes / len(counts)}
            for share, codes in zip(_COVERED_SHARES, needed, strict=True)
        ],
        "most_used": ranked[:_MOST_LISTED],
        "least_used": ranked[::-1][:_MOST_LISTED],
        "dead_codes": np.flatnonzero(counts == 0).tolist(),
    }


def code_usage(counts: NDArray[np.integer[Any]]) -> Usage:
    """How evenly codes are used, from how many tokens each has (K,)."""
    return cast(Usage, usage(counts))


def agreement(equal: int, pairs: int, chance: float | None) -> Agreement:
    """`equal` of `pairs`, as JSON."""
    return {"pairs": int(pairs), "equal": int(equal), "share": equal / pairs if pairs else None, "chance": chance}


def collision(counts: NDArray[np.integer[Any]]) -> float | None:
    """The probability that two tokens drawn with replacement are the same code, of counts (K,); None without tokens."""
    share = counts / max(counts.sum(), 1)
    return float((share**2).sum()) if counts.any() else None


def information(table: NDArray[np.uint32]) -> tuple[float, float, float, float | None]:
    """Mutual information of classes and codes, from counts (classes, K).

    Returns (entropy of codes, entropy of classes, mutual information), in bits, and the last one divided by the mean of
    the two entropies; None where that mean is zero.
    """
    of_codes, of_classes = (code_usage(table.sum(axis, dtype=np.int64))["entropy_bits"] for axis in (0, 1))
    total = int(table.sum())
    joint = 0.0
    for row in table:  # a class at a time, so that no second table of floats is held
        share = row[row > 0] / total
        joint -= float((share * np.log2(share)).sum())
    mutual = max(of_codes + of_classes - joint, 0.0)
    mean = (of_codes + of_classes) / 2
    return of_codes, of_classes, mutual, mutual / mean if mean else None
