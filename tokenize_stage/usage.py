"""The figures of a token store: one pass over its shards, one shard in memory at a time.

`count_store` gives a `StoreFigures`: the part of `mapet tokenize inspect --json` that is counted. All are plain JSON
values; a share of nothing is None, never NaN.
"""

from typing import TypedDict


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
    """Patches beside and above each other in one view; `chance` is two views drawn at random, at the same two places."""

    horizontal: Agreement
    vertical: Agreement


class Overlaps(TypedDict):
    """Two views of one image: patches of the earlier one whose centre lies in the later one, through crop and flip."""

    view_pairs: int
    """Pairs of views of one image that have such a patch."""
    all: Agreement
    same_flip: Agreement
    """Both views are mirrored, or neither."""
    other_flip: Agreement
    """One of the two is mirrored."""


class Labels(TypedDict):
    """What a code says about the class of its image, over the tokens of all labelled images."""

    classes: int
    images: int
    tokens: int
    class_entropy_bits: float
    code_entropy_bits: float
    mutual_information_bits: float
    nmi: float | None
    """mutual information / mean of the two entropies."""
    nmi_by_chance: float | None
    """The same with the labels of other images (those 101 rows further in the shard): what small counts alone give."""


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


class Warning(TypedDict):
    """Something that a sound store or codebook does not show."""

    sign: str
    """A short name: collapsed, same-everywhere, scrambled, shifted, mirrored, ..."""
    what: str
    why: str
    do: str


# A store's report (`inspect`) is {kind: "token store", path, fingerprint, codebook, k, grid, shards, storage, bytes,
# skipped, view, **StoreFigures, warnings: [Warning], "image"?: ..., "against"?: ...}.
