"""The wording of the figures of quality: each as text, with its name and one line that explains it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

MISSING = "-"


class Figure(NamedTuple):
    """One figure of a store."""

    name: str
    value: str
    chance: str
    adjusted: str
    """0 for chance, 1 for the highest possible value."""
    means: str


def quality_figures(quality: Mapping[str, Any]) -> list[Figure]:
    """The figures of `counting.quality.Quality` that are known, in the order in which they are shown."""
    figures = [*_class_figures(quality["labels"]), *_bigram_figures(quality["bigrams"])]
    if quality["pictures"]:
        figures += _picture_figures(quality["pictures"])
    return figures


def _class_figures(labels: Mapping[str, Any] | None) -> Iterator[Figure]:
    if not labels:
        return
    for name, means in (
        ("purity", "tokens whose image has the most common class of their code; chance rises with K"),
        ("class purity", "tokens that have the most common code of their image's class; it falls with K"),
    ):
        found = labels[name.replace(" ", "_")]
        yield Figure(name, _percent(found["value"]), _percent(found["chance"]), score_text(found["adjusted"]), means)
    if labels["information"]:
        nmi = labels["information"]["nmi"]
        value, chance, adjusted = (score_text(nmi[part]) for part in ("value", "chance", "adjusted"))
        yield Figure(
            "class information", value, chance, adjusted, "normalised mutual information of code and class, of 1"
        )


def _bigram_figures(bigrams: Mapping[str, Any]) -> Iterator[Figure]:
    for way, name, beside in (("horizontal", "left tells", "on its left"), ("vertical", "above tells", "above it")):
        found = bigrams[way]
        if found:
            gain = f"{found['gain_bits']:.3f} of {found['unigram_bits']:.3f} bits ({found['share']:.1%})"
            means = f"what the token {beside} tells about a token: the gain of a bigram model on held-out images"
            yield Figure(name, gain, f"{found['chance_bits']:.3f} bits", MISSING, means)


def _picture_figures(pictures: Mapping[str, Any]) -> Iterator[Figure]:
    for part, name, means in (
        ("flips", "stable if mirrored", "tokens that stay the same when the image is mirrored"),
        ("crops", "stable if shifted", "tokens that stay the same when the same pixels have other surroundings"),
        (
            "scales",
            "stable if enlarged",
            "tokens that stay the same when the image is enlarged about 1.25 times",
        ),
    ):
        found = pictures[part]
        if found:
            yield Figure(
                name, _percent(found["share"]), _percent(found["chance"]), score_text(found["adjusted"]), means
            )
    lost = pictures["reconstruction"]
    means = "variance of patch features that is lost when each is replaced by its code's centroid"
    reason = f"none: {lost['reason']}" if lost["error"] is None else f"{lost['error']:.1%}"
    yield Figure("reconstruction error", reason, MISSING, MISSING, means)
    if lost["log2_probability"] is not None:
        means = "mean log2 probability of the chosen code; 0 is certain"
        yield Figure("certainty", f"{lost['log2_probability']:.3f} bits", MISSING, MISSING, means)


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{share:.2%}"


def score_text(value: float | None) -> str:
    """A figure whose highest value is 1, or a dash where it is not known."""
    return MISSING if value is None else f"{value:.4f}"
