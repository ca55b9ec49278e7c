"""The wording of `inspect --against`: what changed from another store or codebook, and the quality of both."""

from collections.abc import Iterator, Mapping
from typing import Any

from .quality_figures import MISSING, Figure, quality_figures, score_text

Rows = Iterator[tuple[str, str]]


def comparison_rows(report: Mapping[str, Any]) -> Rows:
    """The result of `--against` as (name, value) rows of a table; none without that option."""
    if "against" in report:
        yield from _store_comparison(report) if report["kind"] == "token store" else _codebook_comparison(report)


def _store_comparison(report: Mapping[str, Any]) -> Rows:
    against = report["against"]
    yield "codebook", "the same" if against["same_codebook"] else f"another: {against['fingerprint']}"
    keys = against["keys"]
    yield "keys", f"{keys['common']:,} common, {keys['only_here']:,} only here, {keys['only_there']:,} only there"
    here, there = (against["usage"][side] for side in ("here", "there"))
    yield (
        "perplexity",
        f"{here['perplexity']:.1f} of {here['codes']:,}; there {there['perplexity']:.1f} of {there['codes']:,}",
    )
    drift, tokens = against["drift"], against["tokens"]
    if drift:
        yield (
            "drift of usage",
            f"total variation {drift['total_variation']:.4f}, Jensen-Shannon distance {drift['jensen_shannon']:.4f}",
        )
        yield "codes", f"{len(drift['appeared']):,} appeared, {len(drift['vanished']):,} vanished"
    if tokens:
        part = "" if tokens["sampled_every"] == 1 else f" (every {tokens['sampled_every']}th image)"
        yield "equal tokens", f"{tokens['share']:.2%} of {tokens['compared']:,}{part}"
        yield "equal images", f"{tokens['equal_images']:,} of {tokens['images']:,}"
    shared = _shared_text(against["shared_information"])
    if shared:
        yield "codes tell each other", shared
    for note in against["not_compared"]:
        yield "not compared", note


def _codebook_comparison(report: Mapping[str, Any]) -> Rows:
    against, k = report["against"], report["k"]
    yield (
        "codebook",
        "the same" if against["same_codebook"] else f"another: {against['fingerprint']}, K={against['k']:,}",
    )
    if against["usage"]:
        here, there = (against["usage"][side]["perplexity"] for side in ("here", "there"))
        yield "perplexity", f"{here:.1f} of {k:,}; there {there:.1f} of {against['k']:,}"
    match = against["centroids"]
    if match:
        yield "equal centroids", f"{match['equal']:,} of {k:,}"
        yield "nearest there", f"of the same number {match['same_number']:,}, each other's nearest {match['mutual']:,}"
        yield (
            "moved",
            f"{match['moved']:,} of {k:,} ({match['moved'] / k:.1%}): farther than half way to the next one here",
        )
        distance = match["distance"]
        yield "distance", ", ".join(f"{name} {distance[name]:.4g}" for name in ("min", "median", "max"))
    for note in against["not_compared"]:
        yield "not compared", note


def compared_figures(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, of this store, of the other one) for the report of `inspect` of a store with --against."""
    against = report["against"]
    sides = [
        {
            "codes": f"{against['usage'][side]['used']:,} of {against['usage'][side]['codes']:,} used",
            "perplexity": f"{against['usage'][side]['perplexity']:.1f}",
            **{figure.name: _beside(figure) for figure in quality_figures(against["quality"][side])},
        }
        for side in ("here", "there")
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    return [(name, sides[0].get(name, MISSING), sides[1].get(name, MISSING)) for name in names]


def _shared_text(shared: Mapping[str, Any] | None) -> str | None:
    """What the codes of two stores say about each other, as text; None if that is not known."""
    if not shared or not shared["information"]:
        return None
    found = shared["information"]
    chance = MISSING if found["chance_bits"] is None else f"{found['chance_bits']:.3f}"
    return (
        f"{found['bits']:.3f} bits (chance {chance}), normalised {score_text(found['nmi']['value'])}, adjusted "
        f"{score_text(found['nmi']['adjusted'])}, over {shared['patches']:,} patches of {shared['images']:,} images"
    )


def _beside(figure: Figure) -> str:
    parts = [(name, part) for name, part in (("chance", figure.chance), ("adjusted", figure.adjusted)) if part != "-"]
    return f"{figure.value} ({', '.join(f'{name} {part}' for name, part in parts)})" if parts else figure.value
