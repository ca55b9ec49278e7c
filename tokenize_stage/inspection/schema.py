"""What `mapet tokenize inspect --json` holds of a token store, and the arithmetic of its figures.

A store's report is {kind: "token store", path, fingerprint, codebook, k, grid, shards, storage, bytes, skipped, view,
**StoreFigures, warnings: [suspicions.Suspicion]}, and with --key `image`, with --against `against`. All are plain JSON
values; a share of nothing is None, never NaN.
"""

from typing import Any, TypedDict

import numpy as np

from ...shared.tokens.code_usage import usage

_EXTREMES = 10
_COVER = (0.5, 0.9, 0.99)


class Agreement(TypedDict):
    """How often two tokens are the same code."""

    pairs: int
    equal: int
    share: float | None
    """equal / pairs."""
    chance: float | None
    """The share that would be expected of two tokens that have nothing to do with each other."""


class Usage(TypedDict):
    """How evenly codes are used (`shared.codebook.usage`)."""

    codes: int
    used: int
    dead: int
    entropy_bits: float
    perplexity: float


class Cover(TypedDict):
    """The fewest codes that together are `share` of all tokens."""

    share: float
    codes: int
    of_k: float
    """codes / K."""


class Positions(TypedDict):
    """One value for each place of the grid, row by row (H lists of W), over all images and views."""

    perplexity: list[list[float]]
    entropy_bits: list[list[float]]
    used: list[list[int]]
    top_code: list[list[int]]
    """The most used code there (the smallest of equals)."""
    top_share: list[list[float]]
    """Its share of the tokens there."""


class Neighbours(TypedDict):
    """Two patches of one view; `chance` is two views drawn at random, at the same two places."""

    horizontal: Agreement
    """Side by side."""
    vertical: Agreement
    """One above the other."""
    anywhere: Agreement
    """All pairs of places."""


class Supposition(TypedDict):
    """How well overlapping views of a sample of images agree if their tokens had been stored with a certain fault."""

    images: int
    pairs: int
    equal: int
    share: float
    chance: float
    """The same patches, with the second view taken from another image: what the place in the grid alone gives."""
    sigmas: float
    """By how many standard errors (over images) share - chance is higher than that of the tokens as they are."""


class Overlaps(TypedDict):
    """Two views of one image: patches of the earlier one whose centre lies in the later one, through crop and flip."""

    view_pairs: int
    """Pairs of views of one image that have such a patch."""
    all: Agreement
    same_flip: Agreement
    """Both views are mirrored, or neither."""
    other_flip: Agreement
    """One of the two is mirrored."""
    supposing: dict[str, Supposition]
    """as-stored; next, previous (tokens of the image after, before); mirrored; flips-ignored (mirrored views only);
    transposed (rows and columns swapped)."""


class Labels(TypedDict):
    """What a code says about the class of its image, over the tokens of all labelled images."""

    classes: int
    images: int
    tokens: int
    class_entropy_bits: float
    code_entropy_bits: float
    mutual_information_bits: float | None
    """None where classes x codes are too many to count in memory (67 million)."""
    nmi: float | None
    """mutual information / mean of the two entropies."""
    nmi_by_offset: dict[str, float | None]
    """The same with the label of the image that many rows further in the shard (around its end), over every n-th shard,
    about 8 million tokens: "-1" and "1" are what a shift by one image would make of "0", the others what chance gives.
    Empty where it would take too much memory."""


class StoreFigures(TypedDict):
    """All that is counted in one pass."""

    images: int
    views: int
    tokens: int
    labelled: int
    counts: list[int]
    """Of each of the K codes."""
    usage: Usage
    coverage: list[Cover]
    """For 50, 90 and 99 % of the tokens."""
    most_used: list[list[int]]
    """[code, count], at most ten."""
    least_used: list[list[int]]
    """The same of the codes that are used at all, the rarest first."""
    dead_codes: list[int]
    positions: Positions
    same_place: Agreement
    """Two different views drawn at random, at the same place; `chance` is at any two places."""
    neighbours: Neighbours
    overlaps: Overlaps | None
    """None where one view of each image is stored."""
    labels: Labels | None
    """None where no image has a label."""


def code_figures(counts: np.ndarray) -> dict[str, Any]:
    """`counts`, `usage`, `coverage`, `most_used`, `least_used` and `dead_codes` of counts (K,)."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    pick = [[int(code), int(counts[code])] for code in order]
    covered = np.cumsum(counts[order])
    needed = [int(np.searchsorted(covered, share * covered[-1])) + 1 if len(order) else 0 for share in _COVER]
    return {
        "counts": counts.tolist(),
        "usage": usage(counts),
        "coverage": [
            {"share": share, "codes": codes, "of_k": codes / len(counts)}
            for share, codes in zip(_COVER, needed, strict=True)
        ],
        "most_used": pick[:_EXTREMES],
        "least_used": pick[::-1][:_EXTREMES],
        "dead_codes": np.flatnonzero(counts == 0).tolist(),
    }


def agreement(equal: int, pairs: int, chance: float | None) -> Agreement:
    """`equal` of `pairs`, as JSON."""
    return {"pairs": int(pairs), "equal": int(equal), "share": equal / pairs if pairs else None, "chance": chance}


def collision(counts: np.ndarray) -> float | None:
    """How often two tokens, drawn with replacement, are the same code; None without tokens."""
    share = counts / max(counts.sum(), 1)
    return float((share**2).sum()) if counts.any() else None


def information(table: np.ndarray) -> tuple[float, float, float, float | None]:
    """Of counts (classes, K): entropy of codes, of classes, mutual information in bits; normalised by their mean."""
    of_codes, of_classes = (usage(table.sum(axis, dtype=np.int64))["entropy_bits"] for axis in (0, 1))
    whole = int(table.sum())
    joint = 0.0
    for row in table:  # a class at a time, so that no second table of floats is held
        share = row[row > 0] / whole
        joint -= float((share * np.log2(share)).sum())
    mutual = max(of_codes + of_classes - joint, 0.0)
    mean = (of_codes + of_classes) / 2
    return of_codes, of_classes, mutual, mutual / mean if mean else None
