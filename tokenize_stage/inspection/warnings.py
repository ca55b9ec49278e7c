"""The wording of warnings: what is wrong with a store or a codebook, how one can tell, and what to do."""

from collections.abc import Iterable
from typing import TypedDict

from .faults import (
    Collapsed,
    DeadCodes,
    Dominated,
    Fault,
    Finding,
    LabelFault,
    OverlapFault,
    SameEverywhere,
    Scrambled,
    TokensDiffer,
    Twins,
)


class InspectionWarning(TypedDict):
    """One warning of `inspect`."""

    sign: str
    """collapsed, dominated, dead-codes, same-everywhere, scrambled, twins, tokens-differ, or a key of `FAULTS`."""
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
"""The known faults of programs that write tokens, by sign."""
ENCODE_AGAIN = (
    "`mapet tokenize verify TOKENS --codebook C --images IMAGES --reencode 100` computes tokens again and compares "
    "them; if it finds the same, encode again with another --out, or fix the program that wrote these tokens."
)


def as_warnings(findings: Iterable[Finding]) -> list[InspectionWarning]:
    """The warnings for `findings`; two findings with one sign become one warning with two reasons."""
    return merged([_worded(finding) for finding in findings])


def merged(warnings: Iterable[InspectionWarning]) -> list[InspectionWarning]:
    """Joins warnings of the same sign into one that gives both reasons."""
    by_sign: dict[str, InspectionWarning] = {}
    for warning in warnings:
        first = by_sign.get(warning["sign"])
        by_sign[warning["sign"]] = {**first, "why": f"{first['why']}; {warning['why']}"} if first else warning
    return list(by_sign.values())


def fault_warning(fault: Fault, images: int, reference: str) -> InspectionWarning:
    """The warning for a fault that explains why the tokens of `images` images differ from those of `reference`."""
    return _warning(
        fault.sign,
        FAULTS[fault.sign][0].upper() + FAULTS[fault.sign][1:],
        f"in {images:,} images that differ, {fault.as_stored:.1%} of the stored tokens are those of {reference}, and "
        f"{fault.undone:.1%} if that is undone",
        ENCODE_AGAIN,
    )


def difference_warning(difference: TokensDiffer, other: str) -> InspectionWarning:
    """The warning for tokens that differ from those of the store `other` for no known reason."""
    return _warning(
        "tokens-differ",
        f"{difference.share:.1%} of the tokens of common views are not those of {other}",
        "one codebook gives a view the same tokens each time, up to rounding (1 % at most); no known fault explains it",
        f"Encode a few images again with both: {ENCODE_AGAIN}",
    )


def _worded(finding: Finding) -> InspectionWarning:
    match finding:
        case Collapsed() | Dominated() | DeadCodes() | Twins():
            return _worded_codes(finding)
        case SameEverywhere() | Scrambled():
            return _worded_grid(finding)
        case OverlapFault() | LabelFault():
            return _worded_fault(finding)


def _worded_codes(finding: Collapsed | Dominated | DeadCodes | Twins) -> InspectionWarning:
    match finding:
        case Collapsed(perplexity, k, codes):
            return _warning(
                "collapsed",
                f"The codebook has collapsed: {codes:,} of {k:,} codes have 90 % of all patches",
                f"perplexity is {perplexity:.1f} of {k:,}, and k-means over CLIP features gives half of K or more; a "
                "model that predicts such tokens learns little more than the most common ones",
                "Check whether the images are blank or all alike; if not, build the codebook again from more images, "
                "with another --layer, or with --metric cosine.",
            )
        case Dominated(code, share, codes, k):
            return _warning(
                "dominated",
                f"Code {code} alone has {share:.0%} of all patches",
                f"the {codes:,} most common of {k:,} codes have half of them; it is most likely the background",
                "Look at its patches; if they are not background, build the codebook again from more images.",
            )
        case DeadCodes(dead, k, tokens_per_code):
            return _warning(
                "dead-codes",
                f"{dead:,} of {k:,} codes have no patch at all",
                f"with {tokens_per_code:,.0f} patches per code, nearly every code of a suitable codebook has some",
                "Build a codebook from images like these, or choose a smaller --k.",
            )
        case Twins(count):
            return _warning(
                "twins",
                f"{count:,} centroids are equal to another one",
                "equal features get one of their numbers by accident, and the others are wasted",
                "Build it again from more patches, or with a smaller --k.",
            )


def _worded_grid(finding: SameEverywhere | Scrambled) -> InspectionWarning:
    match finding:
        case SameEverywhere(share, chance):
            return _warning(
                "same-everywhere",
                "Every image has nearly the same tokens: they depend on the position in the grid, not on the image",
                f"two images drawn at random have the same code at the same position in {share:.0%} of all positions, "
                f"and at any two positions in {chance:.0%}",
                "The tower saw blank images, or its features are mostly position: look at the images, use another "
                "--layer or --tower, and build the codebook again.",
            )
        case Scrambled(touching, anywhere):
            return _warning(
                "scrambled",
                "Patches that touch are no more alike than patches anywhere in an image",
                f"they share a code in {touching:.1%} of all pairs, and any two patches of an image in {anywhere:.1%}",
                "The tokens are not stored row by row, or their grid has another shape. " + ENCODE_AGAIN,
            )


def _worded_fault(finding: OverlapFault | LabelFault) -> InspectionWarning:
    what = f"Most likely {FAULTS[finding.sign]}"
    match finding:
        case OverlapFault(sign, as_stored, undone, sigmas):
            return _warning(
                sign,
                what,
                f"where two views of an image overlap, their codes agree in {as_stored:.1%} of all patches, and in "
                f"{undone:.1%} if that is undone ({sigmas:.0f} standard errors more, with chance subtracted)",
                ENCODE_AGAIN,
            )
        case LabelFault(sign, own_image, other_image, chance):
            return _warning(
                sign,
                what,
                "codes say less about the class of their own image (normalised mutual information "
                f"{own_image:.4f}) than about that of the {sign} one ({other_image:.4f}); chance gives {chance:.4f}",
                ENCODE_AGAIN,
            )


def _warning(sign: str, what: str, why: str, do: str) -> InspectionWarning:
    return {"sign": sign, "what": what, "why": why, "do": do}
