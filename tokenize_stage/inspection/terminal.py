"""Prints the report of `inspect`: a table, a map of the grid, and warnings; or JSON."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ...shared.runtime.console import foreign, results, table
from .centroids import objective_of
from .comparison_text import compared_figures, comparison_rows
from .quality_figures import quality_figures

_MOST_SKIPPED = 10
_WIDEST_IN_NUMBERS = 16
# From dark to light, in colours that colour-blind readers can tell apart (matplotlib's viridis).
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])

Rows = Iterator[tuple[str, str]]


def show(report: dict[str, Any], *, as_json: bool = False) -> None:
    """Prints what `inspect` returned, as tables or as JSON."""
    if as_json:
        results.print_json(report)
        return
    is_store = report["kind"] == "token store"
    rows = [*_made_by(report["codebook"] if is_store else report, report), *(_store(report) if is_store else ())]
    rows += _usage(report) if report["usage"] else ()
    rows += _store_statistics(report) if is_store else _codebook_statistics(report)
    table(f"{report['kind'].capitalize()} {report['path']}", rows)
    if is_store and report["tokens"]:
        _show_map("Perplexity over the grid", report["positions"]["perplexity"])
        _show_quality(report["quality"])
    if "against" in report:
        table(f"Compared with {report['against']['path']}", list(comparison_rows(report)))
        if is_store:
            _show_grid("Quality compared", ("", "here", "there"), compared_figures(report))
    if "image" in report:
        _show_image(report["image"])
    for warning in report["warnings"]:
        results.print("")
        for line, style in (
            (f"Warning ({warning['sign']}): {warning['what']}.", "bold yellow"),
            (f"  Why: {warning['why']}.", ""),
            (f"  What to do: {warning['do']}", ""),
        ):
            results.print(foreign(line, style), soft_wrap=True)


def complete_description(description: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's description with "-" for the fields of a tower that it lacks: not every tokenizer has a tower."""
    fields = ("tower", "library", "pretrained", "weights_sha256", "layer", "dim", "precision", "metric")
    return {**dict.fromkeys(fields, "-"), **description}


def _made_by(description: Mapping[str, Any], report: Mapping[str, Any]) -> Rows:
    made_by = complete_description(description)
    yield "fingerprint", report["fingerprint"]
    yield "tower", f"{made_by['tower']} ({made_by['library']}, pretrained {made_by['pretrained']})"
    yield "weights", f"sha256 {made_by['weights_sha256']}"
    yield "features", f"layer {made_by['layer']}, {made_by['dim']} dimensions, {made_by['precision']}"
    yield "tower sees", f"{made_by['preprocess']['image_size']} px, {made_by['preprocess']['resize']} side resized"
    if "imported" in made_by:
        origin = made_by["imported"]
        yield "imported", f"K={made_by['k']}, {made_by['metric']}, {origin['name']}, sha256 {origin['sha256']}"
    elif "sample" in made_by:
        faiss = made_by["versions"]["faiss"]
        yield "k-means", f"K={made_by['k']}, {made_by['metric']}, seed {made_by['seed']}, faiss {faiss}"
        yield "trained on", f"{made_by['sample']['patches']:,} patches of {made_by['sample']['images']:,} images"
    yield "grid", f"{report['grid'][0]}x{report['grid'][1]}"


def _store(report: Mapping[str, Any]) -> Rows:
    bytes_per_view = report["bytes"] / max(report["views"], 1)
    yield "images", f"{report['images']:,} ({report['labelled']:,} with a label), {report['views']:,} views"
    yield "tokens", f"{report['tokens']:,}"
    size = f"{report['bytes']:,} bytes in {report['shards']} {report['storage']} shards"
    yield "size", f"{size} ({bytes_per_view:.0f} per view)"
    if report["skipped"]:
        yield "skipped", f"{len(report['skipped']):,} (--json lists them), the first:"
        for entry in report["skipped"][:_MOST_SKIPPED]:
            yield "", f"{entry['shard']}: {entry['key']}: {entry['reason']}"


def _usage(report: Mapping[str, Any]) -> Rows:
    codes = report["usage"]
    yield "codes used / dead", f"{codes['used']:,} / {codes['dead']:,}"
    yield "entropy", f"{codes['entropy_bits']:.3f} of {np.log2(codes['codes']):.3f} bits"
    yield "perplexity", f"{codes['perplexity']:.1f} of {codes['codes']:,}"
    yield (
        "codes that cover",
        ", ".join(f"{cover['share']:.0%} of patches: {cover['codes']:,}" for cover in report["coverage"]),
    )
    yield "most used", ", ".join(f"{code} ({count:,})" for code, count in report["most_used"])
    yield "least used", ", ".join(f"{code} ({count:,})" for code, count in report["least_used"])


def _store_statistics(report: Mapping[str, Any]) -> Rows:
    yield "two images, same position", _agree(report["same_place"])
    neighbours = report["neighbours"]
    anywhere = _percent(neighbours["anywhere"]["share"])
    yield "side by side", f"{_agree(neighbours['horizontal'])}; anywhere in a view {anywhere}"
    yield "above each other", _agree(neighbours["vertical"])
    overlaps = report["overlaps"]
    if overlaps and overlaps["all"]["pairs"]:
        yield "overlapping views", f"{_agree(overlaps['all'])}, in {overlaps['view_pairs']:,} pairs of views"
        yield "- one mirrored", _agree(overlaps["other_flip"])
        yield "- both or neither", _agree(overlaps["same_flip"])
    if report["labels"]:
        yield "code and class", _labels(report["labels"])


def _labels(labels: Mapping[str, Any]) -> str:
    shifted = [
        value for at, value in labels["nmi_by_offset"].items() if at not in ("0", "1", "-1") and value is not None
    ]
    chance = f"; labels of other images {max(shifted):.4f}" if shifted else ""
    if labels["mutual_information_bits"] is None:
        return f"{labels['classes']:,} classes are too many to count with these codes"
    if labels["nmi"] is None:
        return f"{labels['classes']:,} class, nothing to tell apart"
    return (
        f"normalised mutual information {labels['nmi']:.4f}, {labels['mutual_information_bits']:.3f} bits, "
        f"{labels['classes']:,} classes{chance}"
    )


def _codebook_statistics(report: Mapping[str, Any]) -> Rows:
    distances = report["distances"]
    if distances:
        near = distances["nearest"]
        names = ("min", "p10", "median", "p90", "max")
        yield "nearest centroid", ", ".join(f"{name} {near[name]:.4g}" for name in names)
        if distances["of_a_patch"] is not None:
            yield "patch to centroid", f"{distances['of_a_patch']:.4g} (root mean square)"
        yield "closest pairs", ", ".join(f"{a}-{b} ({distance:.3g})" for a, b, distance in distances["closest"])
        if distances["twins"]:
            yield "equal centroids", f"{distances['twins']:,}"
    for number, restart in enumerate(objective_of(report)):
        name = "objective" if not number else ""
        yield name, f"restart {number}: {restart[0]:.4g} -> {restart[-1]:.4g} in {len(restart)} iterations"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _agree(agreement: Mapping[str, Any]) -> str:
    return f"{_percent(agreement['share'])} share a code (chance {_percent(agreement['chance'])})"


def _show_quality(quality: Mapping[str, Any]) -> None:
    images = f"{quality['images']:,} images"
    if quality["pictures"]:
        images += f", {quality['pictures']['images']:,} of them encoded again"
    rows = [figure[:4] for figure in quality_figures(quality)]
    if rows:
        results.print("")
        _show_grid(f"Quality, over {images}", ("", "value", "chance", "adjusted"), rows)


def _show_grid(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    grid = Table(title=foreign(title), title_justify="left")
    for name in header:
        grid.add_column(name, overflow="fold")
    for row in rows:
        grid.add_row(*map(foreign, row))
    results.print(grid)


def _show_map(title: str, grid: list[list[float]]) -> None:
    """Prints coloured blocks on a terminal; elsewhere numbers, or digits from 0 to 9 where a row would be too long."""
    values = np.array(grid)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    results.print(Text(f"\n{title}: {low:.1f} (dark) to {high:.1f} (light)", style="bold"))
    if results.is_terminal and not results.no_color:
        for row in scaled:
            line = Text()
            for share in row:
                line.append("  ", style=f"on rgb({','.join(map(str, _colour(share)))})")
            results.print(line)
    elif values.shape[1] <= _WIDEST_IN_NUMBERS:
        width = len(f"{high:.0f}")
        for row in values:
            results.print(Text(" ".join(f"{value:{width}.0f}" for value in row)))
    else:
        for row in scaled:
            results.print(Text("".join(str(min(int(share * 10), 9)) for share in row)))


def _colour(share: float) -> tuple[int, ...]:
    at = share * (len(_COLOURS) - 1)
    return tuple(int(np.interp(at, range(len(_COLOURS)), _COLOURS[:, channel])) for channel in range(3))


def _show_image(image: dict[str, Any]) -> None:
    for number, view in enumerate(image["views"]):
        crop = view["crop"]
        title = (
            f"{image['key']}: label {image['label']}, {image['width']}x{image['height']} px, view {number}: "
            f"{crop['width']:.1f}x{crop['height']:.1f} at ({crop['left']:.1f}, {crop['top']:.1f})"
            f"{', flipped' if view['flip'] else ''}"
        )
        grid = Table(title=foreign(title), title_justify="left", show_header=False, show_lines=False)
        for row in view["tokens"]:
            grid.add_row(*map(str, row))
        results.print(grid)
