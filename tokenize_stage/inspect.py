"""inspect: what made a codebook or a token store, how its codes are used, and what is wrong with it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upath import UPath

from ..shared.errors import DataError, UsageError
from ..shared.storage.lock import sole_writer
from ..shared.storage.remote import as_path, exists
from ..shared.tokens.codebook import Codebook
from ..shared.tokens.store import TokenStore
from .counting.sample import ImageSample
from .counting.store import count_store
from .inspection.centroids import codebook_statistics
from .inspection.compare import KeptTokens, compare_codebooks, compare_stores
from .inspection.faults import codebook_findings, store_findings
from .inspection.terminal import show
from .inspection.warnings import as_warnings, merged

if TYPE_CHECKING:
    from .pages.page import StorePage
    from .quality.measure import PictureQuality
    from .quality.pictures import StorePictures

__all__ = ["inspect", "show"]

_PARTS_OF_STORES = ("manifest.json", "shards")


def inspect(
    path: str | Path,
    *,
    key: str | None = None,
    against: str | Path | None = None,
    against_codebook: str | Path | None = None,
    html: str | Path | None = None,
    images: str | Path | Sequence[str | Path] | None = None,
    codebook: str | Path | None = None,
    tower: str | None = None,
    quality_images: int = 256,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Shows what made a codebook or a token store, how its codes are used, and what is suspicious about it.

    Each shard of a store is read once, one in memory at a time.

    Args:
        path: A codebook or a token store, local or a URL.
        key: Also show the token grids, crops and label of this image of a store.
        against: Say what changed from this codebook or store to PATH, or how two tokenizers compare; both must be of
            the same kind.
        against_codebook: The codebook of the store `against`: also measure the stability of its tokens.
        html: Also write a page to look at: one file that needs no network.
        images: Pictures for the page and for `codebook`, all or some tars of the tokens' source (not needed if the
            store holds them).
        codebook: The store's codebook: also measure how stable tokens are and what they lose. On the page, show the
            patches nearest each centroid; up to 256 images go through the tower again.
        tower: Where the codebook's tower is now, if it moved.
        quality_images: How many images stability and reconstruction are measured on; 0 leaves these figures out.
        seed: Seed of the images and patches that the page shows and that go through the tower again.
        device: auto, cpu or cuda.

    Returns:
        Plain JSON values. Those of a store are `schema.StoreStatistics`, those of a codebook
        `centroids.codebook_statistics` beside its description; "warnings" lists `warnings.InspectionWarning`; "image"
        is there with `key`, "against" with `against`.

    Raises:
        DataError: `path` is neither a codebook nor a store, is damaged, or has no image with that key.
        UsageError: `key` is given for a codebook, `against` is of the other kind, or an option lacks another one.
        FingerprintMismatch: `codebook` or `tower` did not make the tokens.
    """
    if quality_images < 0:
        raise UsageError(f"--quality-images {quality_images} must be 0 or more.")
    place, other = as_path(path), None if against is None else as_path(against)
    options = {name: value for name, value in (("images", images), ("codebook", codebook), ("tower", tower)) if value}
    _refuse_alone(options, html, against, against_codebook)
    if not _is_store(place, other):
        if key is not None:
            raise UsageError(f"--key {key}: {place} is a codebook; give a token store to see an image's tokens.")
        if options or against_codebook:
            name = min(options, default="against-codebook")
            raise UsageError(f"--{name} belongs to a token store; {place} is a codebook.")
        with _writing(html):
            return _inspect_codebook(place, other, html)
    with _writing(html):
        store, there = TokenStore(place), None if other is None else TokenStore(other)
        pictures = _pictures(store, **options, device=device) if options or html is not None else None
        if codebook and html is None:
            _refuse_without_images(pictures, "--codebook")
        other_pictures = None
        if there is not None and against_codebook:
            other_pictures = _pictures(there, images=images, codebook=against_codebook, device=device)
            _refuse_without_images(other_pictures, "--against-codebook")
        page = None if html is None or pictures is None else _store_page(html, pictures, seed)
        measured = [_measured(some, quality_images, seed) for some in (pictures, other_pictures)]
        report = _inspect_store(store, key, there, *measured)
        if page:
            page.write(report)
        return report


def _writing(html: str | Path | None) -> AbstractContextManager[object]:
    return nullcontext() if html is None else sole_writer(Path(html), option="--html")


def _refuse_alone(
    options: Mapping[str, Any],
    html: str | Path | None,
    against: str | Path | None,
    against_codebook: str | Path | None,
) -> None:
    """Raises UsageError for an option without the one that it belongs to."""
    if against_codebook and against is None:
        raise UsageError(f"--against-codebook {against_codebook} belongs to --against; give the other store, too.")
    if html is None and not against_codebook and options and "codebook" not in options:
        raise UsageError(f"--{min(options)} belongs to a page or to --codebook; give --html FILE or --codebook, too.")


def _refuse_without_images(pictures: "StorePictures | None", option: str) -> None:
    if pictures is not None and not pictures.can_encode:
        raise UsageError(
            f"{option} needs the pictures of {pictures.store.path}, which holds their tokens only; give --images, too."
        )


def _pictures(store: TokenStore, **options: Any) -> "StorePictures":
    from .quality.pictures import StorePictures  # it imports torch, which takes seconds

    return StorePictures(store, **options)


def _measured(pictures: "StorePictures | None", count: int, seed: int) -> "PictureQuality | None":
    """Stability and reconstruction, if there are pictures and a tokenizer."""
    if pictures is None or not pictures.can_encode or not count:
        return None
    from .quality.measure import measure

    return measure(pictures, count, seed)


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


def _store_page(html: str | Path, pictures: "StorePictures", seed: int) -> "StorePage":
    from .pages.page import StorePage

    return StorePage(html, pictures, seed)


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


def _inspect_store(
    store: TokenStore,
    key: str | None,
    other: TokenStore | None,
    measured: "PictureQuality | None",
    other_measured: "PictureQuality | None",
) -> dict[str, Any]:
    image = {} if key is None else {"image": _image(store, key)}  # first, as the key may not exist
    kept, sample = None if other is None else KeptTokens(store), ImageSample(store)
    statistics = count_store(store, [] if kept is None else [kept], sample)
    statistics["quality"]["pictures"] = measured
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
        report["against"], more = compare_stores(store, statistics, sample, kept, other)
        report["against"]["quality"]["there"]["pictures"] = other_measured
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
