"""Finds what is wrong with a token store or a codebook: all arithmetic and thresholds, no wording.

Each function returns findings, small objects that hold the numbers which led to the decision. `warnings` turns them
into sentences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import Tokens
from ..counting.overlaps import arrangements

# Rounding changes about 1 % of tokens at most (bfloat16), so that a fault must explain nearly all of the others.
_EXPLAINED, _ROUNDED = 0.8, 0.02
# CLIP features under k-means use half of K or more, weighted by frequency (perplexity). A store whose tokens would fit
# into a tenth of K has collapsed, or its images are all alike. Few tokens cannot use many codes: ten per code are
# required.
_COLLAPSED, _TOKENS_PER_CODE = 0.1, 10
_DOMINATED = 0.5
_TWINS = 0.01
_MOSTLY_DEAD, _TOKENS_TO_BE_DEAD = 0.5, 50
# Two unrelated images share the code at one position hardly more often than at any two positions.
_SAME_PLACE, _FEWEST_VIEWS = 0.5, 10
# Patches that touch share a code 4 to 10 times as often as any two patches of a photograph (1.2 times in drawings on a
# plain background, with K = 16); in scrambled grids they share one just as often.
_NEIGHBOURS, _FEWEST_PAIRS = 1.1, 5_000
# Five standard errors, over images, happen by chance once in three million; a fifth better is not due to rounding.
_SIGMAS, _BETTER, _FEWEST_IMAGES = 5.0, 1.2, 20
# After a shift by one image the tokens say almost nothing about their own image's class and everything about the
# next one's.
_REMAINING, _SPREADS = 0.25, 6.0


@dataclass(frozen=True)
class Collapsed:
    """Nearly all tokens are a few codes."""

    perplexity: float
    k: int
    codes_of_90_percent: int


@dataclass(frozen=True)
class Dominated:
    """One code has most of the tokens."""

    code: int
    share: float
    codes_of_half: int
    k: int


@dataclass(frozen=True)
class DeadCodes:
    """Most codes have no token, though there are many tokens per code."""

    dead: int
    k: int
    tokens_per_code: float


@dataclass(frozen=True)
class Twins:
    """Centroids that equal another one."""

    count: int


@dataclass(frozen=True)
class SameEverywhere:
    """Tokens depend on the position in the grid and not on the image."""

    share: float
    chance: float


@dataclass(frozen=True)
class Scrambled:
    """Patches that touch share a code no more often than any two patches of an image."""

    touching: float
    anywhere: float


@dataclass(frozen=True)
class OverlapFault:
    """Overlapping views agree better if the fault `sign` is undone."""

    sign: str
    as_stored: float
    undone: float
    sigmas: float


@dataclass(frozen=True)
class LabelFault:
    """Tokens say more about the class of another image (`sign`: next or previous) than about that of their own."""

    sign: str
    own_image: float
    other_image: float
    chance: float
    """All three are normalised mutual information."""


@dataclass(frozen=True)
class Fault:
    """Tokens differ from the right ones, and undoing the fault `sign` makes nearly all of them equal."""

    sign: str
    as_stored: float
    undone: float


@dataclass(frozen=True)
class TokensDiffer:
    """Two stores of one codebook have different tokens for the same views, and no known fault explains it."""

    share: float


Finding = Collapsed | Dominated | DeadCodes | Twins | SameEverywhere | Scrambled | OverlapFault | LabelFault
"""Faults that the statistics of one store or codebook show; `Fault` and `TokensDiffer` need a comparison."""


def code_findings(statistics: Mapping[str, Any]) -> list[Finding]:
    """Findings in `schema.code_statistics` of a store, or of the sample that a codebook was trained on."""
    usage, findings = statistics["usage"], list[Finding]()
    tokens, k = sum(statistics["counts"]), usage["codes"]
    half, most, _ = statistics["coverage"]
    top_code, top_count = statistics["most_used"][0] if statistics["most_used"] else [0, 0]
    if usage["perplexity"] < _COLLAPSED * min(k, tokens / _TOKENS_PER_CODE):
        findings.append(Collapsed(usage["perplexity"], k, most["codes"]))
    elif top_count > _DOMINATED * tokens and k > 2:
        findings.append(Dominated(top_code, top_count / tokens, half["codes"], k))
    if usage["used"] < (1 - _MOSTLY_DEAD) * k and tokens >= _TOKENS_TO_BE_DEAD * k:
        findings.append(DeadCodes(usage["dead"], k, tokens / k))
    return findings


def codebook_findings(statistics: Mapping[str, Any], k: int) -> list[Finding]:
    """Findings in the statistics of a codebook of K codes (`centroids.codebook_statistics`)."""
    findings = code_findings(statistics) if statistics["usage"] else []
    distances = statistics["distances"]
    if distances and distances["twins"] > max(1, _TWINS * k):
        findings.append(Twins(distances["twins"]))
    return findings


def store_findings(statistics: Mapping[str, Any]) -> list[Finding]:
    """Findings in a store's own statistics (`schema.StoreStatistics`), without its images or another store."""
    findings = [*_same_everywhere(statistics), *code_findings(statistics)]
    if any(isinstance(finding, SameEverywhere | Collapsed) for finding in findings):
        return findings  # tokens that do not depend on the image say nothing more
    return [
        *findings,
        *_scrambled(statistics["neighbours"]),
        *_overlap_fault(statistics["overlaps"]),
        *_label_fault(statistics["labels"]),
    ]


def _same_everywhere(statistics: Mapping[str, Any]) -> list[Finding]:
    place = statistics["same_place"]
    if statistics["views"] < _FEWEST_VIEWS or place["share"] < _SAME_PLACE:
        return []
    if place["share"] - place["chance"] < _SAME_PLACE * (1 - place["chance"]):
        return []
    return [SameEverywhere(place["share"], place["chance"])]


def _scrambled(neighbours: Mapping[str, Any]) -> list[Finding]:
    touching = [neighbours[way] for way in ("horizontal", "vertical") if neighbours[way]["pairs"]]
    pairs, equal = (sum(side[name] for side in touching) for name in ("pairs", "equal"))
    anywhere = neighbours["anywhere"]["share"]
    if pairs < _FEWEST_PAIRS or equal >= _NEIGHBOURS * pairs * anywhere:
        return []
    return [Scrambled(equal / pairs, anywhere)]


def _overlap_fault(overlaps: Mapping[str, Any] | None) -> list[Finding]:
    supposing: Mapping[str, Any] = overlaps["supposing"] if overlaps else {}
    stored = supposing.get("as-stored")
    if stored is None or stored["images"] < _FEWEST_IMAGES:
        return []
    sign = max(supposing, key=lambda sign: supposing[sign]["share"] - supposing[sign]["chance"])
    best = supposing[sign]
    gain, gain_as_stored = best["share"] - best["chance"], stored["share"] - stored["chance"]
    if best["sigmas"] < _SIGMAS or gain < _BETTER * gain_as_stored:
        return []
    return [OverlapFault(sign, stored["share"], best["share"], best["sigmas"])]


def _label_fault(labels: Mapping[str, Any] | None) -> list[Finding]:
    if labels is None or not labels["nmi_by_offset"] or labels["images"] < _FEWEST_IMAGES:
        return []
    by_offset: dict[str, float] = {at: nmi for at, nmi in labels["nmi_by_offset"].items() if nmi is not None}
    if len(by_offset) < len(labels["nmi_by_offset"]):
        return []
    # The label of the row before belongs to tokens that are those of the image before.
    sign, offset = max((("next", "1"), ("previous", "-1")), key=lambda pair: by_offset[pair[1]])
    chances = [nmi for at, nmi in by_offset.items() if at not in ("0", "1", "-1")]
    spread = max(max(chances) - min(chances), 1e-9)
    gain, gain_as_stored = (nmi - max(chances) for nmi in (by_offset[offset], by_offset["0"]))
    if gain < _SPREADS * spread or gain_as_stored > _REMAINING * gain:
        return []
    return [LabelFault(sign, by_offset["0"], by_offset[offset], max(chances))]


def find_fault(
    right: Tokens,
    stored: Tokens,
    before: Tokens,
    after: Tokens,
    flips: NDArray[np.bool_],
) -> Fault | None:
    """The known fault that explains why `stored` (n, V, H, W) is not `right` (n, V, H, W), if there is one.

    The other arguments are those of `arrangements`, for the n images whose tokens differ.
    """
    if not len(stored):
        return None
    arranged = arrangements(stored, before, after, flips)
    shares = {sign: float((tokens == right).mean()) for sign, tokens in arranged.items()}
    sign = max(shares, key=lambda sign: shares[sign])
    as_stored = shares["as-stored"]
    if sign == "as-stored" or shares[sign] - as_stored < _EXPLAINED * (1 - as_stored):
        return None
    return Fault(sign, as_stored, shares[sign])


def find_difference(equal_share: float) -> TokensDiffer | None:
    """Whether so few tokens of common views are equal that rounding cannot explain it."""
    return None if equal_share >= 1 - _ROUNDED else TokensDiffer(1 - equal_share)
