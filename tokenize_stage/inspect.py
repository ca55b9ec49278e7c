"""inspect: what made a codebook or a token store, and how evenly its codes are used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..shared.codebook import Codebook, usage
from ..shared.console import progress, results, table
from ..shared.errors import DataError, UsageError
from ..shared.remote import as_path, exists
from ..shared.token_rows import NO_LABEL
from ..shared.token_store import TokenStore

_EXTREMES = 10


def inspect(path: str | Path, *, key: str | None = None) -> dict[str, Any]:
    """Describes a codebook or a token store as plain JSON values.

    With `key`, a token store's answer also holds that image's "image": its token grid(s), crop, flip, size and label.
    Raises DataError if `path` is neither or is damaged, or no image has that key; UsageError for a key in a codebook.
    """
    path = as_path(path)
    if exists(path / "manifest.json") or exists(path / "shards"):
        return _inspect_store(TokenStore(path), key)
    if not exists(path / "codebook.json"):
        raise DataError(f"{path} is neither a codebook nor a token store (no codebook.json, no manifest.json).")
    if key is not None:
        raise UsageError(f"--key {key}: {path} is a codebook; give a token store to see an image's tokens.")
    codebook = Codebook.load(path)
    return {
        "kind": "codebook",
        "path": str(path),
        "fingerprint": codebook.fingerprint,
        **codebook.description,
        # Nobody knows how often the codes of an imported codebook were used.
        "usage": None if "imported" in codebook.description else usage(codebook.counts),
        **_extremes(codebook.counts),
    }


def _inspect_store(store: TokenStore, key: str | None) -> dict[str, Any]:
    counts = np.zeros(store.k, dtype=np.int64)
    views = labelled = 0
    with progress("reading tokens", len(store.entries), "shards") as advance:
        for _, rows in store.shards():
            counts += np.bincount(rows.tokens.reshape(-1), minlength=store.k)
            views += rows.flips.size
            labelled += int((rows.labels != NO_LABEL).sum())
            advance(1)
    entries = store.entries.values()
    about = {
        "kind": "token store",
        "path": str(store.path),
        "fingerprint": store.fingerprint,
        "codebook": store.codebook,
        "images": len(store),
        "labelled": labelled,
        "views": views,
        "tokens": int(counts.sum()),
        "k": store.k,
        "grid": list(store.grid),
        "shards": len(store.entries),
        "storage": store.storage,
        "skipped": [{"shard": shard, "key": key, "reason": reason} for shard, key, reason in store.skipped()],
        "bytes": sum(entry["bytes"] for entry in entries),
        "view": store.view,
        "usage": usage(counts),
        **_extremes(counts),
    }
    return about if key is None else {**about, "image": _image(store, key)}


def _extremes(counts: np.ndarray) -> dict[str, list[list[int]]]:
    """The most and the least used codes as [code, count], dead ones left out."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    pick = [[int(code), int(counts[code])] for code in order]
    return {"most_used": pick[:_EXTREMES], "least_used": pick[::-1][:_EXTREMES]}


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


def show(about: dict[str, Any], *, as_json: bool = False) -> None:
    """Prints what `inspect` returned, as tables or as JSON."""
    if as_json:
        print(json.dumps(about, indent=1, ensure_ascii=False))
        return
    made_by = about["codebook"] if about["kind"] == "token store" else about
    rows = [
        ("fingerprint", about["fingerprint"]),
        ("tower", f"{made_by['tower']} ({made_by['library']}, pretrained {made_by['pretrained']})"),
        ("weights", f"sha256 {made_by['weights_sha256']}"),
        ("features", f"layer {made_by['layer']}, {made_by['dim']} dimensions, {made_by['precision']}"),
        ("tower sees", f"{made_by['preprocess']['image_size']} px, {made_by['preprocess']['resize']} side resized"),
        *_origin(made_by),
        ("grid", f"{about['grid'][0]}x{about['grid'][1]}"),
    ]
    if about["kind"] == "token store":
        a_view = about["bytes"] / max(about["views"], 1)
        rows += [
            ("images", f"{about['images']:,} ({about['labelled']:,} with a label), {about['views']:,} views"),
            ("tokens", f"{about['tokens']:,}"),
            ("size", f"{about['bytes']:,} bytes in {about['shards']} {about['storage']} shards ({a_view:.0f} a view)"),
        ]
        if about["skipped"]:
            rows.append(("skipped", f"{len(about['skipped']):,} (--json lists them), the first:"))
            rows += [("", f"{at['shard']}: {at['key']}: {at['reason']}") for at in about["skipped"][:_EXTREMES]]
    if about["usage"]:
        rows += _usage(about)
    table(f"{about['kind'].capitalize()} {about['path']}", rows)
    if "image" in about:
        _show_image(about["image"])


def _origin(made_by: dict[str, Any]) -> list[tuple[str, str]]:
    """Where a codebook's centroids come from."""
    if "imported" in made_by:
        origin = made_by["imported"]
        return [("imported", f"K={made_by['k']}, {made_by['metric']}, {origin['name']}, sha256 {origin['sha256']}")]
    sample = made_by["sample"]
    return [
        (
            "k-means",
            f"K={made_by['k']}, {made_by['metric']}, seed {made_by['seed']}, faiss {made_by['versions']['faiss']}",
        ),
        ("trained on", f"{sample['patches']:,} patches of {sample['images']:,} images"),
    ]


def _usage(about: dict[str, Any]) -> list[tuple[str, str]]:
    codes = about["usage"]
    return [
        ("codes used / dead", f"{codes['used']:,} / {codes['dead']:,}"),
        ("entropy", f"{codes['entropy_bits']:.3f} of {np.log2(codes['codes']):.3f} bits"),
        ("perplexity", f"{codes['perplexity']:.1f} of {codes['codes']:,}"),
        ("most used", ", ".join(f"{code} ({count:,})" for code, count in about["most_used"])),
        ("least used", ", ".join(f"{code} ({count:,})" for code, count in about["least_used"])),
    ]


def _show_image(image: dict[str, Any]) -> None:
    for number, view in enumerate(image["views"]):
        crop = view["crop"]
        title = (
            f"{image['key']}: label {image['label']}, {image['width']}x{image['height']} px, view {number}: "
            f"{crop['width']:.1f}x{crop['height']:.1f} at ({crop['left']:.1f}, {crop['top']:.1f})"
            f"{', flipped' if view['flip'] else ''}"
        )
        grid = Table(title=title, title_justify="left", show_header=False, show_lines=False)
        for row in view["tokens"]:
            grid.add_row(*map(str, row))
        results.print(grid)
