"""What a sound store or codebook does not show, in words: what is wrong, how one can tell, what to do."""

from collections.abc import Mapping
from typing import Any, TypedDict

from .faults import _ROUNDED


class Suspicion(TypedDict):
    """One warning of `inspect`."""

    sign: str
    """collapsed, dominated, dead-codes, same-everywhere, scrambled, twins, tokens-differ, or a fault (`FAULTS`)."""
    what: str
    why: str
    do: str


FAULTS = {
    "next": "the tokens of each image are those of the next image: tokens were shifted by one against their keys",
    "previous": "the tokens of each image are those of the image before: tokens were shifted by one against their keys",
    "mirrored": "the tokens are mirrored left to right against their images",
    "flips-ignored": "the tokens of mirrored views are those of the view that is not mirrored: flips were not applied",
    "transposed": "rows and columns of the token grids are swapped",
}
ENCODE_AGAIN = (
    "`mapet tokenize verify TOKENS --codebook C --images IMAGES --reencode 100` computes tokens again and compares; "
    "if it says so, too, encode again with another --out, or mend the program that wrote these tokens."
)

# CLIP features under k-means use half of K or more, evenly weighted (perplexity); what a tenth of K would do has
# collapsed, or sees images that are all alike. Few tokens cannot use many codes: ten a code are asked for.
_COLLAPSED, _TOKENS_PER_CODE = 0.1, 10
_DOMINATED = 0.5
_TWINS = 0.01
_MOSTLY_DEAD, _TOKENS_TO_BE_DEAD = 0.5, 50
# Two unrelated images share the code of a place hardly more often than that of any two places.
_SAME_PLACE, _FEWEST_VIEWS = 0.5, 10
# Patches that touch share a code 4 to 10 times as often as any two patches of a photograph (1.2 times in drawings on an
# even ground, with K = 16); those of scrambled grids just as often.
_NEIGHBOURS, _FEWEST_PAIRS = 1.1, 5_000
# Five standard errors, over images, are chance once in three million; a fifth better is no matter of rounding either.
_SIGMAS, _BETTER, _FEWEST_IMAGES = 5.0, 1.2, 20
# A shift leaves of what tokens say about classes as good as nothing where it was, and all of it one row further.
_LEFT, _SPREADS = 0.25, 6.0


def suspect_codes(figures: Mapping[str, Any]) -> list[Suspicion]:
    """What the usage of codes alone tells: `usage.code_figures` of a store, or of a codebook's sample."""
    usage, found = figures["usage"], []
    tokens, k = sum(figures["counts"]), usage["codes"]
    half, most, _ = figures["coverage"]
    top = figures["most_used"][0] if figures["most_used"] else [0, 0]
    if usage["perplexity"] < _COLLAPSED * min(k, tokens / _TOKENS_PER_CODE):
        found.append(
            _suspicion(
                "collapsed",
                f"The codebook has collapsed: {most['codes']:,} of {k:,} codes have 90 % of all patches",
                f"perplexity is {usage['perplexity']:.1f} of {k:,}, and k-means over CLIP features gives half of K or "
                "more; who predicts such tokens learns little but the commonest of them",
                "Look whether the images are blank or all alike; if not, build the codebook again from more images, "
                "with another --layer, or with --metric cosine.",
            )
        )
    elif top[1] > _DOMINATED * tokens and k > 2:
        found.append(
            _suspicion(
                "dominated",
                f"Code {top[0]} alone has {top[1] / tokens:.0%} of all patches",
                f"the {half['codes']:,} commonest of {k:,} codes have half of them; it is most likely the background",
                "Look at its patches; if they are not background, build the codebook again from more images.",
            )
        )
    if usage["used"] < (1 - _MOSTLY_DEAD) * k and tokens >= _TOKENS_TO_BE_DEAD * k:
        found.append(
            _suspicion(
                "dead-codes",
                f"{usage['dead']:,} of {k:,} codes have no patch at all",
                f"with {tokens / k:,.0f} patches a code nearly every code of a fitting codebook has some",
                "Build a codebook from images like these, or choose a smaller --k.",
            )
        )
    return found


def suspect_codebook(figures: Mapping[str, Any], k: int) -> list[Suspicion]:
    """What the figures of a codebook of K codes (`centroids.codebook_figures`) tell."""
    found, apart = suspect_codes(figures) if figures["usage"] else [], figures["distances"]
    if apart and apart["twins"] > max(1, _TWINS * k):
        found.append(
            _suspicion(
                "twins",
                f"{apart['twins']:,} centroids are equal to another one",
                "equal features get one of their numbers by accident, and the others are wasted",
                "Build it again from more patches, or with a smaller --k.",
            )
        )
    return found


def suspect_store(figures: Mapping[str, Any]) -> list[Suspicion]:
    """What a store's own figures (`usage.StoreFigures`) tell, without images or another store."""
    found = _same_everywhere(figures) + suspect_codes(figures)
    if any(one["sign"] in ("same-everywhere", "collapsed") for one in found):
        return found  # codes that do not depend on what is seen say nothing more
    return merged([*found, *_scrambled(figures), *_overlaps(figures["overlaps"]), *_labels(figures["labels"])])


def merged(found: list[Suspicion]) -> list[Suspicion]:
    """Two ways to see one fault are two reasons for one suspicion."""
    by_sign: dict[str, Suspicion] = {}
    for one in found:
        before = by_sign.get(one["sign"])
        by_sign[one["sign"]] = {**before, "why": f"{before['why']}; {one['why']}"} if before else one
    return list(by_sign.values())


def _same_everywhere(figures: Mapping[str, Any]) -> list[Suspicion]:
    place = figures["same_place"]
    if figures["views"] < _FEWEST_VIEWS or place["share"] < _SAME_PLACE:
        return []
    if place["share"] - place["chance"] < _SAME_PLACE * (1 - place["chance"]):
        return []
    return [
        _suspicion(
            "same-everywhere",
            "Every image has nearly the same tokens: they depend on the place in the grid, not on the image",
            f"two images drawn at random have the same code at the same place in {place['share']:.0%} of all places, "
            f"and at any two places in {place['chance']:.0%}",
            "The tower saw blank images or its features are mostly position: look at the images, take another --layer "
            "or --tower, and build the codebook again.",
        )
    ]


def _scrambled(figures: Mapping[str, Any]) -> list[Suspicion]:
    near = figures["neighbours"]
    touching = [near[way] for way in ("horizontal", "vertical") if near[way]["pairs"]]
    pairs, equal = (sum(side[name] for side in touching) for name in ("pairs", "equal"))
    if pairs < _FEWEST_PAIRS or equal >= _NEIGHBOURS * pairs * near["anywhere"]["share"]:
        return []
    return [
        _suspicion(
            "scrambled",
            "Patches that touch are no more alike than patches anywhere in an image",
            f"they share a code in {equal / pairs:.1%} of all pairs, and any two patches of an image in "
            f"{near['anywhere']['share']:.1%}",
            "The tokens lie in another order than row by row, or their grid has another shape. " + ENCODE_AGAIN,
        )
    ]


def _overlaps(overlaps: Mapping[str, Any] | None) -> list[Suspicion]:
    supposing = (overlaps or {}).get("supposing", {})
    stored = supposing.get("as-stored")
    if stored is None or stored["images"] < _FEWEST_IMAGES:
        return []
    sign = max(supposing, key=lambda sign: supposing[sign]["share"] - supposing[sign]["chance"])
    best = supposing[sign]
    gain, own = best["share"] - best["chance"], stored["share"] - stored["chance"]
    if best["sigmas"] < _SIGMAS or gain < _BETTER * own:
        return []
    return [
        _suspicion(
            sign,
            f"Most likely {FAULTS[sign]}",
            f"where two views of an image overlap, their codes agree in {stored['share']:.1%} of all patches, and in "
            f"{best['share']:.1%} if that is undone ({best['sigmas']:.0f} standard errors more, chance taken off)",
            ENCODE_AGAIN,
        )
    ]


def _labels(labels: Mapping[str, Any] | None) -> list[Suspicion]:
    by = (labels or {}).get("nmi_by_offset") or {}
    if None in by.values() or not by or labels["images"] < _FEWEST_IMAGES:
        return []
    # The label of the row before belongs to tokens that are those of the image before.
    sign, offset = max((("next", "1"), ("previous", "-1")), key=lambda pair: by[pair[1]])
    chance = [value for at, value in by.items() if at not in ("0", "1", "-1")]
    spread = max(max(chance) - min(chance), 1e-9)
    gain, own = (value - max(chance) for value in (by[offset], by["0"]))
    if gain < _SPREADS * spread or own > _LEFT * gain:
        return []
    return [
        _suspicion(
            sign,
            f"Most likely {FAULTS[sign]}",
            f"codes say less about the class of their own image (normalised mutual information {by['0']:.4f}) "
            f"than about that of the {sign} one ({by[offset]:.4f}); chance gives {max(chance):.4f}",
            ENCODE_AGAIN,
        )
    ]


def suspect_fault(sign: str, shares: Mapping[str, float], images: int, other: str) -> Suspicion:
    """The words for what `fault_of` found in `images` images, compared with `other`."""
    return _suspicion(
        sign,
        FAULTS[sign][0].upper() + FAULTS[sign][1:],
        f"in {images:,} images that differ, {shares['as-stored']:.1%} of the stored tokens are those of {other}, and "
        f"{shares[sign]:.1%} if that is undone",
        ENCODE_AGAIN,
    )


def suspect_difference(tokens: Mapping[str, Any], other: str) -> list[Suspicion]:
    """Whether two stores of one codebook have other tokens for the same views (`against`), and no fault explains it."""
    if tokens["share"] >= 1 - _ROUNDED:
        return []
    return [
        _suspicion(
            "tokens-differ",
            f"{1 - tokens['share']:.1%} of the tokens of common views are not those of {other}",
            "one codebook gives one token to one view, but for rounding (1 % at most); no known fault explains it",
            f"Encode a few images again with both: {ENCODE_AGAIN}",
        )
    ]


def _suspicion(sign: str, what: str, why: str, do: str) -> Suspicion:
    return {"sign": sign, "what": what, "why": why, "do": do}
