"""Writes the HTML page of a codebook or a token store: inspect --html."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.errors import DataError
from ...shared.report.pictures import data_uri, golden_colours, hex_colours
from ...shared.report.render import say_page, write_page
from ...shared.runtime.console import progress
from ...shared.storage.files import refuse_folder
from ...shared.tokens.store import TokenStore
from ...shared.tokens.stored_views import Place, StoredViews, by_shard, choose_images
from ..inspection.comparison_text import compared_figures, comparison_rows
from ..inspection.quality_figures import quality_figures
from ..inspection.terminal import complete_description
from ..quality.pictures import StorePictures
from .gallery import Patch, choose_codes, nearest_patches, sample_patches
from .token_maps import code_colours

IMAGES, CODES, PATCHES = 96, 48, 6
"""The most images, codes, and patches of each code that a page shows."""
_IMAGE_SIDE, _PATCH_SIDE = 256, 112


class StorePage:
    """The page of a token store. It is opened before the store is read, so that a wrong option is reported at once."""

    def __init__(self, html: str | Path, pictures: StorePictures, seed: int = 0):
        """Raises UsageError if the page would replace a folder."""
        self.html, self.pictures, self.seed = _page_path(html), pictures, seed
        self.store, self.views = pictures.store, pictures.views

    def write(self, report: dict[str, Any]) -> Path:
        """Writes the page of a `report` by `inspect`; the image in its "image" comes first on the page.

        Raises:
            DataError: an image cannot be read or changed since it was encoded.
            FingerprintMismatch: the tower is not that of the codebook.
        """
        galleries = self._galleries(report) if self.views.shards else _NO_GALLERIES
        colours = code_colours(self.pictures.saved.codebook) if self.pictures.saved else golden_colours(self.store.k)
        return _write(self.html, report, colours, galleries)

    def _galleries(self, report: dict[str, Any]) -> dict[str, Any]:
        store, views = self.store, self.views
        places = choose_images(store, views.shards, IMAGES, self.seed)
        if "image" in report:
            first = _place_of(store, report["image"]["key"], views)
            others = [place for place in places if (place.shard, place.row) != (first.shard, first.row)]
            places = [first, *others[: IMAGES - 1]]
        codes = choose_codes(np.array(report["counts"]), CODES)
        with progress("choosing patches", len(views.shards), "shards") as advance:
            patches = sample_patches(store, views.shards, codes, self.seed, advance)
        nearest = None
        if self.pictures.can_encode:
            nearest = nearest_patches(store, views, self.pictures.tokenizer, patches, PATCHES, self.seed)
        patches = nearest.patches if nearest else {code: drawn[:PATCHES] for code, drawn in patches.items()}
        return {
            "images": _image_cards(store, views, places),
            "codes": _code_cards(report, store, views, patches),
            "nearest": nearest and {"images": nearest.images, "equal": nearest.equal, "by_logit": nearest.by_logit},
        }


_NO_GALLERIES: dict[str, Any] = {"images": [], "codes": [], "nearest": None}


def write_codebook_page(report: dict[str, Any], html: str | Path) -> Path:
    """Writes the page of a codebook's `report` by `inspect`; UsageError if the page would replace a folder."""
    return _write(_page_path(html), report, golden_colours(report["k"]), _NO_GALLERIES)


def _page_path(html: str | Path) -> Path:
    path = Path(html)
    refuse_folder(path, "--html", "report.html")
    return path


def _write(path: Path, report: dict[str, Any], colours: NDArray[np.uint8], galleries: dict[str, Any]) -> Path:
    name = Path(report["path"]).name or report["path"]
    write_page(path, "store", title=f"{name}: {report['kind']}", name=name, **_content(report, colours, galleries))
    say_page(path)
    return path


def _content(report: dict[str, Any], colours: NDArray[np.uint8], galleries: dict[str, Any]) -> dict[str, Any]:
    """The variables of the template and the data of its script."""
    made_by = complete_description(report.get("codebook", report))
    perplexity = report["positions"]["perplexity"] if "positions" in report else None
    data = {
        "k": report["k"],
        "grid": report["grid"],
        # The counts of an imported codebook are not known.
        "counts": report["counts"] or [0] * report["k"],
        "colours": hex_colours(colours),
        "perplexity": perplexity,
        "objective": made_by.get("objective"),
        "images": [{"key": image["key"], "tokens": image["tokens"]} for image in galleries["images"]],
    }
    return {
        "data": data,
        "about": report,
        "made_by": made_by,
        "against": list(comparison_rows(report)),
        "quality": quality_figures(report["quality"]) if "quality" in report else [],
        "compared": compared_figures(report) if "quality" in report and "against" in report else [],
        "most_bits": float(np.log2(report["k"])),
        "poorest": perplexity and float(np.min(perplexity)),
        "richest": perplexity and float(np.max(perplexity)),
        **galleries,
    }


def _place_of(store: TokenStore, key: str, views: StoredViews) -> Place:
    """The first view of the image with that key."""
    for name in views.shards:
        matches = np.flatnonzero(store.read_rows(name).keys == key)
        if len(matches):
            return Place(name, int(matches[0]), 0)
    raise DataError(f"--images has no image with key {key!r}; give the tars that hold it, too.")


def _image_cards(store: TokenStore, views: StoredViews, places: Sequence[Place]) -> list[dict[str, Any]]:
    """The text and the picture of each view in `places`, in their order."""
    wanted: dict[tuple[str, int], set[int]] = {}
    for place in places:
        wanted.setdefault((place.shard, place.row), set()).add(place.view)
    cards = {}
    for shard, rows, indices in by_shard(store, wanted):
        for row, view in ((index, view) for index in indices for view in wanted[shard, index]):
            cards[Place(shard, row, view)] = {
                "key": str(rows.keys[row]),
                "label": rows.label(row),
                "view": view,
                "views": store.views,
                "mirrored": bool(rows.flips[row, view]),
                "picture": data_uri(views.view(shard, rows, row, view, _IMAGE_SIDE)),
                "tokens": rows.tokens[row, view].reshape(-1).tolist(),
            }
    return [cards[place] for place in dict.fromkeys(places)]


def _code_cards(
    report: dict[str, Any], store: TokenStore, views: StoredViews, patches: dict[int, list[Patch]]
) -> list[dict[str, Any]]:
    """The text of each code, in the order of `patches`, and the pictures that contain its patches."""
    pictures: dict[Place, tuple[str, str]] = {}
    wanted = {patch.place for code_patches in patches.values() for patch in code_patches}
    for shard, rows, indices in by_shard(store, ((place.shard, place.row) for place in wanted)):
        for place in (place for place in sorted(wanted) if place.shard == shard and place.row in indices):
            picture = data_uri(views.view(shard, rows, place.row, place.view, _PATCH_SIDE))
            pictures[place] = str(rows.keys[place.row]), picture
    ranks = np.argsort(np.argsort(-np.array(report["counts"]), kind="stable"))
    return [
        {
            "code": code,
            "count": report["counts"][code],
            "rank": int(ranks[code]) + 1,
            "patches": [_patch_card(patch, *pictures[patch.place], store.grid) for patch in code_patches],
        }
        for code, code_patches in patches.items()
    ]


def _patch_card(patch: Patch, key: str, picture: str, grid: tuple[int, int]) -> dict[str, Any]:
    row, column = divmod(patch.at, grid[1])
    return {"key": key, "picture": picture, "row": row, "column": column, "match": patch.match}
