"""verify: is a token store whole, unchanged, and made with the codebook it names?"""

import zlib
from pathlib import Path

import numpy as np

from ..shared.codebook import Codebook, read_description
from ..shared.console import progress, say, table
from ..shared.errors import DataError, FingerprintMismatch, MapetError
from ..shared.files import sha256_file
from ..shared.images import ImageRecord, read_bytes
from ..shared.sources import SourceShard, open_source
from ..shared.token_store import ShardRows, TokenStore, read_entry


def verify(tokens: str | Path, *, codebook: str | Path | None = None, images: str | None = None) -> int:
    """Checks a token store; returns the number of images that were checked.

    Every file must be there with the digest that the manifest states, every shard's rows must be consistent, its
    tokens below K, its keys unique, and its codebook the embedded one. With `codebook`, that is compared too; with
    `images`, the source's digests and every image's bytes (CRC32).

    Raises DataError naming everything that is wrong, or FingerprintMismatch for another codebook.
    """
    store = TokenStore(tokens)
    if codebook is not None:
        _same_codebook(store, Codebook.load(codebook))
    sources = {shard.name: shard for shard in open_source(images)} if images is not None else None
    problems = _check_embedded(store)
    seen: set[str] = set()
    with progress("verifying", len(store.entries), "shards") as advance:
        for name in store.entries:
            problems += _check_shard(store, name, seen, sources)
            advance(1)
    if sources:
        problems += [f"{name} of --images is not in the store" for name in sources if name not in store.entries]
    listed = {entry["file"] for entry in store.entries.values()}
    present = {f"shards/{path.name}" for path in (store.path / "shards").glob("*.zarr.zip")}
    problems += [f"{store.path / name} is not in the manifest" for name in sorted(present - listed)]
    if len(seen) != len(store) and not problems:
        problems.append(f"the manifest states {len(store)} images and the shards hold {len(seen)}")
    if problems:
        for problem in problems:
            say(f"- {problem}")
        raise DataError(f"{store.path} is not sound: {len(problems)} problem(s), the first: {problems[0]}.")
    checked = [
        "manifest",
        "codebook.json",
        "shards",
        *(["centroids"] if codebook else []),
        *(["source images"] if images else []),
    ]
    table(
        "Verified",
        [
            ("store", str(store.path)),
            ("shards", f"{len(store.entries)}, all whole"),
            ("images", f"{len(seen):,}"),
            ("codebook", store.fingerprint),
            ("checked", ", ".join(checked)),
        ],
    )
    return len(seen)


def _same_codebook(store: TokenStore, codebook: Codebook) -> None:
    if codebook.fingerprint != store.fingerprint:
        raise FingerprintMismatch(
            f"{store.path} was made with codebook {store.fingerprint[:12]}; --codebook is {codebook.fingerprint[:12]}."
        )


def _check_embedded(store: TokenStore) -> list[str]:
    path = store.path / "codebook.json"
    problems = []
    if sha256_file(path) != store.manifest["codebook_sha256"]:
        problems.append(f"{path} is not the one the manifest was written with")
    if read_description(path)["fingerprint"] != store.fingerprint:
        problems.append(f"{path} has another fingerprint than the manifest")
    return problems


def _check_shard(store: TokenStore, name: str, seen: set[str], sources: dict[str, SourceShard] | None) -> list[str]:
    try:
        if read_entry(store.path, name) != store.entries[name]:
            return [f"shards/{name}.json says other things than the manifest"]
        rows = store.read_rows(name)
    except MapetError as error:
        return [str(error).rstrip(".")]
    problems = _check_rows(store, name, rows)
    doubled = [key for key in rows.keys if key in seen]
    seen.update(rows.keys)
    if doubled:
        problems.append(f"{name} holds {len(doubled)} keys that another shard holds too, such as {doubled[0]!r}")
    if sources is not None:
        problems += _check_source(store, name, rows, sources.get(name))
    return problems


def _check_rows(store: TokenStore, name: str, rows: ShardRows) -> list[str]:
    entry = store.entries[name]
    problems = []
    if len(rows) != entry["images"] or len(set(rows.keys)) != len(rows):
        problems.append(f"{name} does not hold {entry['images']} different keys")
    if rows.tokens.shape[2:] != store.grid or rows.tokens.dtype != np.uint16:
        problems.append(f"{name} has tokens of shape {rows.tokens.shape} for a {store.grid} grid")
    elif rows.tokens.size and int(rows.tokens.max()) >= store.k:
        problems.append(f"{name} has token {int(rows.tokens.max())} and K is {store.k}")
    if entry["codebook_fingerprint"] != store.fingerprint:
        problems.append(
            f"{name} was made with codebook {entry['codebook_fingerprint'][:12]}, not {store.fingerprint[:12]}"
        )
    return problems


def _check_source(store: TokenStore, name: str, rows: ShardRows, source: SourceShard | None) -> list[str]:
    if source is None:
        return [f"{name} has no source in --images"]
    problems = []
    with source.staged() as here:
        if here.sha256() != store.entries[name]["source"]["sha256"]:
            problems.append(f"{source.root} ({name}) is not the one that was encoded (its digest differs)")
        records = {record.key: record for record in here.index([])}
        for key, crc32 in zip(rows.keys, rows.crc32, strict=True):
            problem = _check_image(records.get(key), key, int(crc32))
            if problem:
                return [*problems, f"{name}: {problem}"]
    return problems


def _check_image(record: ImageRecord | None, key: str, crc32: int) -> str | None:
    if record is None:
        return f"image {key!r} is not in the source"
    if zlib.crc32(read_bytes(record)) != crc32:
        return f"image {key!r} has other bytes than when it was encoded"
    return None
