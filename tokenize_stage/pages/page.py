"""inspect --html: a codebook or a token store as a page to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...shared.errors import DataError, UsageError
from ...shared.report.pictures import data_uri, golden_colours, hex_colours
from ...shared.report.render import write_page
from ...shared.runtime.console import progress, say
from ...shared.tokens.codebook import Codebook
from ...shared.tokens.rows import NO_LABEL
from ...shared.tokens.store import TokenStore
from ...shared.tokens.stored_views import Place, StoredViews, by_shard, choose_images
from ..inspection.terminal import against_rows
from .gallery import Patch, choose_codes, nearest_patches, refuse_other_codebook, sample_patches
from .token_maps import code_colours

IMAGES, CODES, PATCHES = 96, 48, 6
"""The most images and codes that a page shows, and patches of each code."""
_IMAGE_SIDE, _PATCH_SIDE = 256, 112


class StorePage:
    """The page of a token store: opened before the store is read, so that a wrong option is told at once."""

    def __init__(
        self,
        store: TokenStore,
        html: str | Path,
        *,
        images: str | None = None,
        codebook: str | Path | None = None,
        tower: str | None = None,
        seed: int = 0,
        device: str = "auto",
    ):
        """Options as `inspect` takes them.

        Raises DataError for images that are not those of the store, FingerprintMismatch for another codebook,
        UsageError for a page that cannot lie where it should.
        """
        self.html, self.store, self.seed = _place(html), store, seed
        self.views = StoredViews(store, images)
        self.book = Codebook.load(codebook) if codebook else None
        self.tower, self.device = tower, device
        if self.book:
            refuse_other_codebook(store, self.book)

    def write(self, about: dict[str, Any]) -> Path:
        """Writes what `inspect` said of the store; an "image" in it is the first one on the page.

        Raises DataError for an image that cannot be read or is not the one that was encoded, FingerprintMismatch for
        another tower.
        """
        shown = self._galleries(about) if self.views.shards else _NOTHING
        colours = code_colours(self.book) if self.book else golden_colours(self.store.k)
        return _write(self.html, about, colours, shown)

    def _galleries(self, about: dict[str, Any]) -> dict[str, Any]:
        store, views = self.store, self.views
        places = choose_images(store, views.shards, IMAGES, self.seed)
        if "image" in about:
            first = _place_of(store, about["image"]["key"], views)
            others = [place for place in places if (place.shard, place.row) != (first.shard, first.row)]
            places = [first, *others[: IMAGES - 1]]
        codes = choose_codes(np.array(about["counts"]), CODES)
        with progress("choosing patches", len(views.shards), "shards") as advance:
            patches = sample_patches(store, views.shards, codes, self.seed, advance)
        near = (
            nearest_patches(store, views, self.book, patches, PATCHES, self.seed, self.tower, self.device)
            if self.book
            else None
        )
        patches = near.patches if near else {code: found[:PATCHES] for code, found in patches.items()}
        return {
            "images": _image_cards(store, views, places),
            "codes": _code_cards(about, store, views, patches),
            "nearest": near and {"images": near.images, "equal": near.equal},
        }


_NOTHING: dict[str, Any] = {"images": [], "codes": [], "nearest": None}


def write_codebook_page(about: dict[str, Any], html: str | Path) -> Path:
    """Writes what `inspect` said of a codebook; UsageError for a page that cannot lie where it should."""
    return _write(_place(html), about, golden_colours(about["k"]), _NOTHING)


def _place(html: str | Path) -> Path:
    path = Path(html)
    if path.is_dir():
        raise UsageError(f"--html {path} is a folder; give a file, such as {path / 'report.html'}.")
    return path


def _write(path: Path, about: dict[str, Any], colours: np.ndarray, shown: dict[str, Any]) -> Path:
    name = Path(about["path"]).name or about["path"]
    write_page(path, "store", title=f"{name}: {about['kind']}", name=name, **_content(about, colours, shown))
    say(f"The page is {path} ({path.stat().st_size / 1e6:.1f} MB); it opens in any browser, without a network.")
    return path


def _content(about: dict[str, Any], colours: np.ndarray, shown: dict[str, Any]) -> dict[str, Any]:
    """All that the template and its script see."""
    made_by = about.get("codebook", about)
    perplexity = about["positions"]["perplexity"] if "positions" in about else None
    data = {
        "k": about["k"],
        "grid": about["grid"],
        # Of an imported codebook nobody knows them.
        "counts": about["counts"] or [0] * about["k"],
        "colours": hex_colours(colours),
        "perplexity": perplexity,
        "objective": made_by.get("objective"),
        "images": [{"key": image["key"], "tokens": image["tokens"]} for image in shown["images"]],
    }
    return {
        "data": data,
        "about": about,
        "made_by": made_by,
        "against": list(against_rows(about)),
        "most_bits": float(np.log2(about["k"])),
        "poorest": perplexity and float(np.min(perplexity)),
        "richest": perplexity and float(np.max(perplexity)),
        **shown,
    }


def _place_of(store: TokenStore, key: str, views: StoredViews) -> Place:
    """The first view of the image with that key."""
    for name in views.shards:
        (found,) = np.nonzero(store.read_rows(name).keys == key)
        if len(found):
            return Place(name, int(found[0]), 0)
    raise DataError(f"--images has no image with key {key!r}; give the tars that hold it, too.")


def _image_cards(store: TokenStore, views: StoredViews, places: Sequence[Place]) -> list[dict[str, Any]]:
    """What the page says of each view in `places`, in their order, with its picture."""
    wanted: dict[tuple[str, int], set[int]] = {}
    for place in places:
        wanted.setdefault((place.shard, place.row), set()).add(place.view)
    cards = {}
    for shard, rows, chosen in by_shard(store, wanted):
        for row, view in ((place, view) for place in chosen for view in wanted[shard, place]):
            label = int(rows.labels[row])
            cards[Place(shard, row, view)] = {
                "key": str(rows.keys[row]),
                "label": None if label == NO_LABEL else label,
                "view": view,
                "views": store.views,
                "mirrored": bool(rows.flips[row, view]),
                "picture": data_uri(views.view(shard, rows, row, view, _IMAGE_SIDE)),
                "tokens": rows.tokens[row, view].reshape(-1).tolist(),
            }
    return [cards[place] for place in dict.fromkeys(places)]


def _code_cards(
    about: dict[str, Any], store: TokenStore, views: StoredViews, patches: dict[int, list[Patch]]
) -> list[dict[str, Any]]:
    """What the page says of each code, in the order of `patches`, with the pictures that its patches lie in."""
    drawn: dict[Place, tuple[str, str]] = {}
    wanted = {patch.place for found in patches.values() for patch in found}
    for shard, rows, chosen in by_shard(store, ((place.shard, place.row) for place in wanted)):
        for place in (place for place in sorted(wanted) if place.shard == shard and place.row in chosen):
            picture = data_uri(views.view(shard, rows, place.row, place.view, _PATCH_SIDE))
            drawn[place] = str(rows.keys[place.row]), picture
    ranks = np.argsort(np.argsort(-np.array(about["counts"]), kind="stable"))
    return [
        {
            "code": code,
            "count": about["counts"][code],
            "rank": int(ranks[code]) + 1,
            "patches": [_patch_card(patch, *drawn[patch.place], store.grid) for patch in found],
        }
        for code, found in patches.items()
    ]


def _patch_card(patch: Patch, key: str, picture: str, grid: tuple[int, int]) -> dict[str, Any]:
    row, column = divmod(patch.at, grid[1])
    return {"key": key, "picture": picture, "row": row, "column": column, "distance": patch.distance}
