"""inspect: what made a codebook or a token store, how its codes are used, and whether it is any good."""

from pathlib import Path
from typing import Any

from upath import UPath

from ..shared.errors import DataError, UsageError
from ..shared.storage.remote import as_path, exists
from ..shared.tokens.codebook import Codebook
from ..shared.tokens.rows import NO_LABEL
from ..shared.tokens.store import TokenStore
from .inspection.centroids import codebook_figures
from .inspection.compare import Kept, compare_codebooks, compare_stores
from .inspection.counting import count_store
from .inspection.terminal import show
from .inspection.warnings import merged, suspect_codebook, suspect_store

__all__ = ["inspect", "show"]


def inspect(
    path: str | Path,
    *,
    key: str | None = None,
    against: str | Path | None = None,
    html: str | Path | None = None,
    images: str | None = None,
    codebook: str | Path | None = None,
    tower: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Describes a codebook or a token store as plain JSON values; its shards are read once, one in memory at a time.

    A store's figures are those of `figures.StoreFigures`, a codebook's those of `centroids.codebook_figures` beside its
    description. "warnings" lists what a sound one does not show (`suspicions.Suspicion`).

    Args:
        path: a codebook or a token store, local or a URL.
        key: the answer also holds that image's "image": its token grid(s), crop, flip, size and label.
        against: another artifact of the same kind; the answer's "against" says what changed from it to `path`.
        html: a file to write the same to as a page, with pictures of a store's images and codes. With `key`, that image
            is the first one.
        images: of the page: what the tokens were made of, or some of its tars; not needed where the store holds them.
        codebook: of the page: what made the tokens. Similar codes get similar colours, and the patches that are shown
            of a code are those nearest its centroid, for which at most 256 images go through the tower again.
        tower: where the codebook's tower is now, if it moved.
        seed: of the images and patches that the page shows.
        device: "auto", "cpu" or "cuda", for the tower.

    Raises DataError if `path` is neither or is damaged, or no image has that key; UsageError for a key in a codebook,
    a store against a codebook, or an option of the page without one; FingerprintMismatch for another codebook or tower.
    """
    path = as_path(path)
    shown = {name: value for name, value in (("images", images), ("codebook", codebook), ("tower", tower)) if value}
    if shown and html is None:
        raise UsageError(f"--{min(shown)} belongs to a page; give --html FILE, too.")
    other = None if against is None else as_path(against)
    for one in (path, other):
        if one is not None and not _is_store(one) and not exists(one / "codebook.json"):
            raise DataError(f"{one} is neither a codebook nor a token store (no codebook.json, no manifest.json).")
    if _is_store(path):
        if other is not None and not _is_store(other):
            raise UsageError(f"--against {other}: it is no token store, and {path} is one; give two of the same kind.")
        store = TokenStore(path)
        page = None if html is None else _store_page(store, html, **shown, seed=seed, device=device)
        about = _inspect_store(store, key, None if other is None else TokenStore(other))
        if page:
            page.write(about)
        return about
    if key is not None:
        raise UsageError(f"--key {key}: {path} is a codebook; give a token store to see an image's tokens.")
    if other is not None and _is_store(other):
        raise UsageError(
            f"--against {other}: it is a token store, and {path} is a codebook; give two of the same kind."
        )
    if shown:
        raise UsageError(f"--{min(shown)} belongs to the page of a token store; {path} is a codebook.")
    about = _inspect_codebook(path, other)
    if html is not None:
        from .pages.page import write_codebook_page

        write_codebook_page(about, html)
    return about


def _store_page(store: TokenStore, html: str | Path, **options: Any):
    from .pages.page import StorePage  # it may open a tower; figures alone need not wait for torch

    return StorePage(store, html, **options)


def _is_store(path: Path | UPath) -> bool:
    return exists(path / "manifest.json") or exists(path / "shards")


def _inspect_codebook(path: Path | UPath, other: Path | UPath | None) -> dict[str, Any]:
    codebook = Codebook.load(path)
    figures = codebook_figures(codebook)
    about = {
        "kind": "codebook",
        "path": str(path),
        "fingerprint": codebook.fingerprint,
        **codebook.description,
        **figures,
        "warnings": suspect_codebook(figures, codebook.k),
    }
    if other is not None:
        about["against"] = compare_codebooks(codebook, Codebook.load(other), str(other))
    return about


def _inspect_store(store: TokenStore, key: str | None, other: TokenStore | None) -> dict[str, Any]:
    image = {} if key is None else {"image": _image(store, key)}  # before all is read: it may not be there
    kept = None if other is None else Kept(store)
    figures = count_store(store, [] if kept is None else [kept])
    about = {
        "kind": "token store",
        "path": str(store.path),
        "fingerprint": store.fingerprint,
        "codebook": store.codebook,
        "k": store.k,
        "grid": list(store.grid),
        "shards": len(store.entries),
        "storage": store.storage,
        "skipped": [{"shard": shard, "key": key, "reason": reason} for shard, key, reason in store.skipped()],
        "bytes": sum(entry["bytes"] for entry in store.entries.values()),
        "view": store.view,
        **figures,
        "warnings": suspect_store(figures),
        **image,
    }
    if kept is not None and other is not None:
        about["against"], found = compare_stores(store, figures, kept, other)
        about["warnings"] = merged([*about["warnings"], *found])
    return about


def _image(store: TokenStore, key: str) -> dict[str, Any]:
    rows, at = store.find(key)
    label = int(rows.labels[at])
    return {
        "key": key,
        "label": None if label == NO_LABEL else label,
        "height": int(rows.sizes[at, 0]),
        "width": int(rows.sizes[at, 1]),
        "views": [
            {
                "crop": dict(zip(("top", "left", "height", "width"), map(float, crop), strict=True)),
                "flip": bool(flip),
                "tokens": grid.tolist(),
            }
            for crop, flip, grid in zip(rows.crops[at], rows.flips[at], rows.tokens[at], strict=True)
        ],
    }
