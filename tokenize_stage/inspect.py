"""inspect: what made a codebook or a token store, how its codes are used, and what is wrong with it."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upath import UPath

from ..shared.errors import DataError, UsageError
from ..shared.storage.lock import sole_writer
from ..shared.storage.remote import as_path, exists
from ..shared.tokens.codebook import Codebook
from ..shared.tokens.store import TokenStore
from .counting.store import count_store
from .inspection.centroids import codebook_statistics
from .inspection.compare import KeptTokens, compare_codebooks, compare_stores
from .inspection.faults import codebook_findings, store_findings
from .inspection.terminal import show
from .inspection.warnings import as_warnings, merged

if TYPE_CHECKING:
    from .pages.page import StorePage

__all__ = ["inspect", "show"]

_PARTS_OF_STORES = ("manifest.json", "shards")


def inspect(
    path: str | Path,
    *,
    key: str | None = None,
    against: str | Path | None = None,
    html: str | Path | None = None,
    images: str | Path | Sequence[str | Path] | None = None,
    codebook: str | Path | None = None,
    tower: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Shows what made a codebook or a token store, how its codes are used, and what is suspicious about it.

    Each shard of a store is read once, one in memory at a time.

    Args:
        path: A codebook or a token store, local or a URL.
        key: Also show the token grids, crops and label of this image of a store.
        against: Say what changed from this codebook or store to PATH; both must be of the same kind.
        html: Also write a page to look at: one file that needs no network.
        images: Pictures for the page, all or some tars of the tokens' source (not needed if the store holds them).
        codebook: For the page, show the patches nearest each centroid; up to 256 images go through the tower again.
        tower: Where the codebook's tower is now, if it moved.
        seed: Seed of the images and patches that the page shows.
        device: auto, cpu or cuda.

    Returns:
        Plain JSON values. Those of a store are `schema.StoreStatistics`, those of a codebook
        `centroids.codebook_statistics` beside its description; "warnings" lists `warnings.InspectionWarning`; "image"
        is there with `key`, "against" with `against`.

    Raises:
        DataError: `path` is neither a codebook nor a store, is damaged, or has no image with that key.
        UsageError: `key` is given for a codebook, `against` is of the other kind, or an option of the page is given
            without a page.
        FingerprintMismatch: `codebook` or `tower` did not make the tokens.
    """
    place = as_path(path)
    other = None if against is None else as_path(against)
    options = {name: value for name, value in (("images", images), ("codebook", codebook), ("tower", tower)) if value}
    if options and html is None:
        raise UsageError(f"--{min(options)} belongs to a page; give --html FILE, too.")
    is_store = _is_store(place, other)
    if not is_store:
        if key is not None:
            raise UsageError(f"--key {key}: {place} is a codebook; give a token store to see an image's tokens.")
        if options:
            raise UsageError(f"--{min(options)} belongs to the page of a token store; {place} is a codebook.")
    with nullcontext() if html is None else sole_writer(Path(html), option="--html"):
        if not is_store:
            return _inspect_codebook(place, other, html)
        store = TokenStore(place)
        page = None if html is None else _store_page(store, html, **options, seed=seed, device=device)
        report = _inspect_store(store, key, None if other is None else TokenStore(other))
        if page:
            page.write(report)
        return report


def _is_store(path: Path | UPath, other: Path | UPath | None) -> bool:
    """Whether `path` and `other` are stores and not codebooks; refuses anything else."""
    kinds = []
    for place in (path,) if other is None else (path, other):
        has_codebook, has_centroids = (exists(place / name) for name in ("codebook.json", "centroids.safetensors"))
        # A store that was begun holds the description of its codebook, and no centroids.
        kinds.append(not has_centroids and (has_codebook or any(exists(place / name) for name in _PARTS_OF_STORES)))
        if not kinds[-1] and not has_codebook:
            raise DataError(f"{place} is neither a codebook nor a token store (no codebook.json, no manifest.json).")
    if len(set(kinds)) > 1:
        names = ["a token store" if kind else "a codebook" for kind in kinds]
        raise UsageError(f"--against {other} is {names[1]} and {path} is {names[0]}; give two of the same kind.")
    return kinds[0]


def _store_page(store: TokenStore, html: str | Path, **options: Any) -> "StorePage":
    from .pages.page import StorePage  # it imports torch, which takes seconds

    return StorePage(store, html, **options)


def _inspect_codebook(path: Path | UPath, other: Path | UPath | None, html: str | Path | None) -> dict[str, Any]:
    codebook = Codebook.load(path)
    statistics = codebook_statistics(codebook)
    report = {
        "kind": "codebook",
        "path": str(path),
        "fingerprint": codebook.fingerprint,
        **codebook.description,
        **statistics,
        "warnings": as_warnings(codebook_findings(statistics, codebook.k)),
    }
    if other is not None:
        report["against"] = compare_codebooks(codebook, Codebook.load(other), str(other))
    if html is not None:
        from .pages.page import write_codebook_page

        write_codebook_page(report, html)
    return report


def _inspect_store(store: TokenStore, key: str | None, other: TokenStore | None) -> dict[str, Any]:
    image = {} if key is None else {"image": _image(store, key)}  # first, as the key may not exist
    kept = None if other is None else KeptTokens(store)
    statistics = count_store(store, [] if kept is None else [kept])
    warnings = as_warnings(store_findings(statistics))
    report: dict[str, Any] = {
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
        **statistics,
        "warnings": warnings,
        **image,
    }
    if kept is not None and other is not None:
        report["against"], more = compare_stores(store, statistics, kept, other)
        report["warnings"] = merged([*warnings, *more])
    return report


def _image(store: TokenStore, key: str) -> dict[str, Any]:
    rows, at = store.find(key)
    return {
        "key": key,
        "label": rows.label(at),
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
