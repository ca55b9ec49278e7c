"""Imports tokens that were computed elsewhere into a token store; a CSV says which row belongs to which image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zlib_ng.zlib_ng import crc32

from ...shared.artifacts.codes import Tokens, token_dtype
from ...shared.errors import DataError, UsageError
from ...shared.images.decode import upright_size
from ...shared.images.views import CENTER, Preprocess, center_box
from ...shared.runtime.console import progress, table
from ...shared.sources.options import DEFAULT, SourceOptions
from ...shared.sources.records import ImageRecord, read_bytes
from ...shared.sources.sources import SourceShard, open_source, read_records
from ...shared.storage.files import refuse_existing, sha256_file, write_sealed_json
from ...shared.tokens.codebook import Codebook, read_description
from ...shared.tokens.rows import ShardRows
from ...shared.tokens.store import TokenStore, entry_path, read_entry, write_manifest, write_shard
from ..encoding.shards import as_rows
from ..towers.features import ExtractedBatch
from .arrays import open_array
from .csv_list import read_listing, rows_of_keys

_ROWS_AT_ONCE = 65_536


def import_store(
    file: Path,
    listing: Path,
    images: str | Path | Sequence[str | Path],
    codebook: str | Path,
    out: Path,
    options: SourceOptions = DEFAULT,
) -> TokenStore:
    """Writes the tokens in `file`, whose rows the CSV `listing` names, to the store `out`; see `import_tokens`."""
    book = Codebook.load(codebook)
    tokens = _read_tokens(file, book)
    named = read_listing(listing, len(tokens))
    if len(named) != len(tokens):
        raise DataError(f"--csv {listing} names {len(named)} images, and --tokens {file} has {len(tokens)} rows.")
    shards = open_source(images, options)
    records = read_records(images, shards=shards)
    folder = _folder_of(shards)
    until = options.until("folder" if folder else "tar")
    row_of = rows_of_keys(named, [record.key for record in records], folder, listing, until)
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
            shard_attributes = {**attributes, "source": shard.describe()}
            entries.append(_import_shard(out, shard, book, tokens, row_of, shard_attributes))
            advance(entries[-1]["images"])
    write_manifest(out, read_description(out / "codebook.json"), sorted(entries, key=lambda entry: entry["name"]))
    store = TokenStore(out)
    table(
        "Token store, imported",
        [
            ("images", f"{len(store):,} in {len(shards)} shards"),
            ("tokens", f"{store.grid[0]}x{store.grid[1]} per view, K={store.k}, from {file.name} and {listing.name}"),
            ("codebook", store.fingerprint),
            ("written to", str(out)),
        ],
    )
    return store


def _read_tokens(file: Path, book: Codebook) -> NDArray[np.integer[Any]]:
    """The tokens (n, H, W), memory-mapped. Raises DataError for another shape, or if one is not below K."""
    array, (height, width) = open_array(file, "--tokens"), book.grid
    if array.dtype.kind not in "iu" or array.shape[1:] not in ((height * width,), (height, width)):
        raise DataError(
            f"--tokens {file} holds {array.dtype} of shape {array.shape}; the codebook's grid needs integers "
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
    out: Path,
    shard: SourceShard,
    book: Codebook,
    tokens: NDArray[np.integer[Any]],
    row_of: dict[str, int],
    attributes: dict[str, Any],
) -> dict[str, Any]:
    """Writes one shard, unless an interrupted import already did; returns its entry of the manifest."""
    if entry_path(out, shard.name).exists():
        entry = read_entry(out, shard.name)
        if attributes.items() <= entry.items() and (out / entry["file"]).is_file():
            return entry
    records = shard.index()
    grids = tokens[[row_of[record.key] for record in records]].astype(token_dtype(book.k))[:, None]
    write_shard(out, shard.name, _rows(shard, records, book, grids), attributes)
    return read_entry(out, shard.name)


def _rows(shard: SourceShard, records: list[ImageRecord], book: Codebook, tokens: Tokens) -> ShardRows:
    """The rows that encoding the centre views would store, with the given tokens (n, 1, H, W)."""
    preprocess = Preprocess.from_json(book.description["preprocess"])
    count = len(records)
    crops, sizes = np.empty((count, 1, 4)), np.empty((count, 2), dtype=np.int32)
    checksums = np.empty(count, dtype=np.uint32)
    for at, record in enumerate(records):
        data = read_bytes(record)
        width, height = upright_size(data, f"{record.path}: image {record.key!r}", record.max_pixels)
        crops[at, 0] = center_box(preprocess, width, height)
        sizes[at] = height, width
        checksums[at] = crc32(data)
    unused = np.empty((count, 1, 0, 0), dtype=np.float32)
    batch = ExtractedBatch(records, unused, crops, np.zeros((count, 1), dtype=bool), sizes, checksums, [])
    return as_rows(shard, batch, tokens)
