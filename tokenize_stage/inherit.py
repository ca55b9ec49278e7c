"""import: centroids and tokens that were computed elsewhere -> a codebook and a token store like our own.

Rows are joined to images by the names in a CSV; nothing is taken by its position among the images.
"""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.errors import DataError, UsageError
from ..shared.images.decode import upright_size
from ..shared.images.records import ImageRecord, crc32, read_bytes
from ..shared.images.sources import SourceShard, open_source, read_records
from ..shared.images.views import CENTER, Preprocess, center_box
from ..shared.runtime.console import progress, say, table
from ..shared.runtime.devices import choose_device, refuse_many_processes
from ..shared.storage.files import refuse_existing, sha256_file, write_sealed_json
from ..shared.tokens.codebook import MAX_K, Codebook, read_description
from ..shared.tokens.rows import ShardRows
from ..shared.tokens.store import TokenStore, entry_path, read_entry, write_manifest, write_shard
from .encoding.shards import as_rows
from .kmeans.train import METRICS
from .listing import read_listing, rows_of_keys
from .towers.features import ExtractedBatch
from .towers.opening import open_tower
from .towers.tower import TowerSettings

_LENGTH_TOLERANCE = 1e-3
_ROWS_AT_ONCE = 65_536


def import_tokens(
    out: str | Path,
    *,
    centroids: str | Path | None = None,
    tower: str = "RN50x64",
    pretrained: str | None = None,
    layer: int = -1,
    final_norm: bool = False,
    image_size: int | None = None,
    precision: str = "float32",
    metric: str = "l2",
    device: str = "auto",
    tokens: str | Path | None = None,
    csv: str | Path | None = None,
    images: str | Path | Sequence[str | Path] | None = None,
    codebook: str | Path | None = None,
) -> Codebook | TokenStore:
    """Takes centroids into a codebook, or (in another call) tokens into a token store.

    Args:
        out: folder to write: a codebook with `centroids`, a token store with `tokens`.
        centroids: .npy, floats (K, dim).
        tower, pretrained, layer, final_norm, image_size, precision: what gave the features, as for `build_codebook`.
        metric: "l2", or "cosine" (centroids of length one).
        device: where the tower is opened.
        tokens: .npy, integers (n, H * W) or (n, H, W); row i belongs to the image that row i of `csv` names.
        csv: list of images; the column path, file, filename, image or key, or else the first one, holds a key or a
            path whose key (in a folder: relative to it) is one of the source's.
        images: the source, local, as for `build_codebook`; crops are the tower's centre crops.
        codebook: the codebook of the tokens.

    Raises:
        DataError for arrays of another shape or with impossible values, and for images that are missing, foreign or
        named twice; UsageError for options that do not fit together or an `out` that holds something else.
    """
    refuse_many_processes()
    parts = {"--tokens": tokens, "--csv": csv, "--images": images, "--codebook": codebook}
    missing = [name for name, value in parts.items() if value is None]
    if centroids is not None and len(missing) == len(parts):
        settings = TowerSettings(tower, pretrained, image_size, layer, final_norm, precision)
        return _import_centroids(Path(centroids), Path(out), settings, metric, device)
    if centroids is None and not missing:
        return _import_store(Path(tokens), Path(csv), images, codebook, Path(out))
    raise UsageError(
        "import takes either --centroids (a codebook) or all of --tokens, --csv, --images and --codebook (a token "
        f"store){'; missing: ' + ', '.join(missing) if centroids is None else ''}."
    )


def _open_array(path: Path, option: str) -> np.ndarray:
    """A .npy file, left on disk; DataError if it is none."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{option} {path} cannot be read as a .npy array ({reason}).") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{option} {path} holds several arrays; save the one that is meant as .npy.")
    return array


# Centroids


def _import_centroids(file: Path, out: Path, settings: TowerSettings, metric: str, device: str) -> Codebook:
    if metric not in METRICS:
        raise UsageError(f"--metric {metric} is unknown; choose {' or '.join(METRICS)}.")
    centroids = _read_centroids(file, metric)
    source = {"name": file.name, "sha256": sha256_file(file)}
    request = {**asdict(settings), "metric": metric, "imported": source}
    if (out / "centroids.safetensors").exists() and Codebook.load(out).description.get("request") == request:
        say(f"{out} already holds this codebook; nothing to do.")
        return Codebook.load(out)
    refuse_existing(out)
    opened = open_tower(settings, choose_device(device))
    if centroids.shape[1] != opened.dim:
        raise DataError(
            f"--centroids {file} have {centroids.shape[1]} dimensions, and --tower {settings.tower} (layer "
            f"{settings.layer}) gives features of {opened.dim}; give the tower and layer they were made with."
        )
    description = {
        **opened.description(),
        "k": len(centroids),
        "metric": metric,
        "imported": source,
        "request": request,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "timm", "numpy", "pillow")},
    }
    book = Codebook(centroids, np.zeros(len(centroids), dtype=np.int64), description)
    book.save(out)
    table(
        "Codebook, imported",
        [
            ("tower", f"{settings.tower} (layer {settings.layer}, {settings.precision})"),
            ("centroids", f"{book.k:,} of {opened.dim:,} dimensions, {metric}, from {file.name}"),
            ("grid", f"{book.grid[0]}x{book.grid[1]}"),
            ("fingerprint", book.fingerprint),
            ("written to", str(out)),
        ],
    )
    return book


def _read_centroids(file: Path, metric: str) -> np.ndarray:
    array = _open_array(file, "--centroids")
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
        raise DataError(f"--centroids {file} holds {array.dtype} of shape {array.shape}; it must be floats (K, dim).")
    if not 2 <= len(array) <= MAX_K:
        raise DataError(f"--centroids {file} holds {len(array)} centroids; there must be 2 to {MAX_K}.")
    with np.errstate(over="ignore"):
        centroids = np.ascontiguousarray(array, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(centroids).all(axis=1))
    if len(bad):
        raise DataError(f"--centroids {file} holds values that are not finite, first in row {bad[0]}.")
    lengths = np.linalg.norm(centroids, axis=1)
    odd = np.flatnonzero(abs(lengths - 1) > _LENGTH_TOLERANCE)
    if metric == "cosine" and len(odd):
        raise DataError(
            f"--centroids {file}: row {odd[0]} has length {lengths[odd[0]]:.4g}, and --metric cosine compares "
            "centroids of length one; give --metric l2 or normalise them."
        )
    return centroids


# Tokens


def _import_store(
    file: Path, listing: Path, images: str | Path | Sequence[str | Path], codebook: str | Path, out: Path
) -> TokenStore:
    book = Codebook.load(codebook)
    tokens = _read_tokens(file, book)
    named = read_listing(listing, len(tokens))
    if len(named) != len(tokens):
        raise DataError(f"--csv {listing} names {len(named)} images, and --tokens {file} has {len(tokens)} rows.")
    shards, records = open_source(images), read_records(images)
    row_of = rows_of_keys(named, [record.key for record in records], _folder_of(shards), listing)
    attributes = {
        "codebook_fingerprint": book.fingerprint,
        "view": CENTER.to_json(),
        "skipped": [],
        "imported": {"tokens_sha256": sha256_file(file), "csv_sha256": sha256_file(listing)},
    }
    _begin(out, book, codebook)
    entries = []
    with progress("importing", len(records)) as advance:
        for shard in shards:
            about = {**attributes, "source": shard.describe()}
            entries.append(_import_shard(out, shard, book, tokens, row_of, about))
            advance(entries[-1]["images"])
    write_manifest(out, read_description(out / "codebook.json"), sorted(entries, key=lambda entry: entry["name"]))
    store = TokenStore(out)
    table(
        "Token store, imported",
        [
            ("images", f"{len(store):,} in {len(shards)} shards"),
            ("tokens", f"{store.grid[0]}x{store.grid[1]} a view, K={store.k}, from {file.name} and {listing.name}"),
            ("codebook", store.fingerprint),
            ("written to", str(out)),
        ],
    )
    return store


def _read_tokens(file: Path, book: Codebook) -> np.ndarray:
    """The tokens on disk as (n, H, W), every one below K."""
    array, (height, width) = _open_array(file, "--tokens"), book.grid
    if array.dtype.kind not in "iu" or array.shape[1:] not in ((height * width,), (height, width)):
        raise DataError(
            f"--tokens {file} holds {array.dtype} of shape {array.shape}; the codebook's grid wants integers "
            f"(n, {height * width}) or (n, {height}, {width})."
        )
    for start in range(0, len(array), _ROWS_AT_ONCE):
        part = array[start : start + _ROWS_AT_ONCE]
        if part.size and not 0 <= part.min() <= part.max() < book.k:
            row = start + int(np.flatnonzero(((part < 0) | (part >= book.k)).reshape(len(part), -1).any(1))[0])
            raise DataError(f"--tokens {file} holds a token below 0 or not below K = {book.k}, first in row {row}.")
    return array.reshape(len(array), height, width)


def _folder_of(shards: Sequence[SourceShard]) -> Path | None:
    return None if shards[0].is_tar else Path(shards[0].root)


def _begin(out: Path, book: Codebook, codebook: str | Path) -> None:
    embedded = out / "codebook.json"
    if not embedded.exists():
        refuse_existing(out)
        write_sealed_json(embedded, book.as_json(sha256_file(Path(codebook) / "centroids.safetensors")))
    elif read_description(embedded)["fingerprint"] != book.fingerprint or (out / "manifest.json").exists():
        raise UsageError(f"{out} already holds a token store; choose another --out or delete it.")


def _import_shard(
    out: Path, shard: SourceShard, book: Codebook, tokens: np.ndarray, row_of: dict[str, int], about: dict[str, Any]
) -> dict[str, Any]:
    """Writes one shard, unless an interrupted import wrote it; returns its entry of the manifest."""
    if entry_path(out, shard.name).exists():
        entry = read_entry(out, shard.name)
        if about.items() <= entry.items() and (out / entry["file"]).is_file():
            return entry
    records = shard.index()
    grids = tokens[[row_of[record.key] for record in records]].astype(np.uint16)[:, None]
    write_shard(out, shard.name, _rows(shard, records, book, grids), about)
    return read_entry(out, shard.name)


def _rows(shard: SourceShard, records: list[ImageRecord], book: Codebook, tokens: np.ndarray) -> ShardRows:
    """What encoding the centre views would store, but for the tokens: from the images' bytes and headers."""
    preprocess = Preprocess.from_json(book.description["preprocess"])
    count = len(records)
    crops, sizes = np.empty((count, 1, 4)), np.empty((count, 2), dtype=np.int32)
    checksums = np.empty(count, dtype=np.uint32)
    for at, record in enumerate(records):
        data = read_bytes(record)
        width, height = upright_size(data, f"{record.path}: image {record.key!r}")
        crops[at, 0] = center_box(preprocess, width, height)
        sizes[at] = height, width
        checksums[at] = crc32(data)
    unused = np.empty((count, 1, 0, 0), dtype=np.float32)
    batch = ExtractedBatch(records, unused, crops, np.zeros((count, 1), dtype=bool), sizes, checksums, [])
    return as_rows(shard, batch, tokens)
