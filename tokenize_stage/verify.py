"""verify: checks that a codebook or a token store is whole and unchanged, and fits its codebook and its images."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from upath import UPath
from zlib_ng.zlib_ng import crc32

from ..shared.artifacts.codes import MAX_K_OF_UINT16
from ..shared.errors import DataError, FingerprintMismatch, MapetError, UsageError
from ..shared.runtime.console import progress, say, table
from ..shared.sources.keys import KeyLedger, Skipped
from ..shared.sources.records import ImageRecord, read_bytes
from ..shared.sources.sources import SourceShard, open_source
from ..shared.storage.files import sha256_file
from ..shared.storage.remote import as_path, exists, file_size
from ..shared.tokens.codebook import Codebook, read_description
from ..shared.tokens.rows import ShardRows
from ..shared.tokens.store import TokenStore, read_entry, shard_files

if TYPE_CHECKING:
    # They import torch, which only --codebook, --reencode and an imported tokenizer need.
    from .encoding.reencode import Reencoding
    from .tokenizers.opening import SavedTokenizer

Sources = Mapping[str, SourceShard]


def verify(
    tokens: str | Path,
    *,
    codebook: str | Path | None = None,
    images: str | Path | Sequence[str | Path] | None = None,
    reencode: int = 0,
    seed: int = 0,
    tower: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
) -> int:
    """Checks that every shard is present, whole, checksummed and made with the codebook it names.

    Every file must have the digest that the manifest states, every shard's rows must be consistent, its tokens below
    K, its keys unique, and its codebook the embedded one.

    Args:
        tokens: A token store or a codebook, local or a URL.
        codebook: Also check that the tokens were made with this codebook, centroids included.
        images: Also check the source, every image's bytes included; each image must be stored or listed as skipped.
        reencode: Also encode this many random images again and compare all their views; needs --images and --codebook.
        seed: Seed of the choice of images that are encoded again.
        tower: Where the codebook's tower is now, if it moved.
        batch_size: Views per forward pass.
        workers: Processes that decode images (default: 0 on the CPU, up to 16 on CUDA).
        device: auto, cpu or cuda.

    Returns:
        The number of images (or centroids) that were checked.

    Raises:
        DataError: Something is wrong; the message gives the first problem, and all are printed. If one known fault
            (`inspection.warnings.FAULTS`) explains all wrong tokens, it comes first.
        FingerprintMismatch: The store was made with another codebook.
        UsageError: The options do not fit together.
    """
    path = as_path(tokens)
    _refuse_options(codebook, images, reencode)
    began = time.monotonic()
    if exists(path / "centroids.safetensors"):
        return _verify_codebook(path, codebook or images)
    store = TokenStore(path)
    saved = None if codebook is None else _same_codebook(store, codebook)
    sources = {shard.name: shard for shard in open_source(images, store.source_options)} if images is not None else None
    images_checked, problems = _check_store(store, sources)
    seconds = time.monotonic() - began
    again = None
    if reencode and saved and sources and not problems:
        from .encoding.reencode import encode_again

        tokenizer = saved.open(tower=tower, device=device)
        again = encode_again(store, tokenizer, sources, reencode, seed, batch_size, workers)
        problems += again.problems
    if problems:
        for problem in problems:
            say(f"- {problem}")
        raise DataError(f"{store.path} is damaged or wrong: {len(problems)} problem(s), the first: {problems[0]}.")
    _summary(store, images_checked, codebook, sources, again, seconds)
    return images_checked


def _refuse_options(codebook: str | Path | None, images: object, reencode: int) -> None:
    if reencode < 0:
        raise UsageError(f"--reencode {reencode} must be a number of images.")
    if reencode and images is None:
        raise UsageError(f"--reencode {reencode} needs the images: give --images, too.")
    if reencode and codebook is None:
        raise UsageError(
            f"--reencode {reencode} needs the centroids, which a store does not hold: give --codebook, too."
        )


def _verify_codebook(path: Path | UPath, other_option: object) -> int:
    if other_option is not None:
        raise UsageError(f"{path} is a codebook; --codebook and --images go with a token store.")
    book = Codebook.load(path)
    k, dim = map(int, book.centroids.shape)
    files = ["codebook.json", "centroids.safetensors"]
    if "encoder_sha256" in book.description:
        files.append(_checked_encoder(path, book.description["encoder_sha256"]))
    table(
        "Verified",
        [
            ("codebook", str(path)),
            ("centroids", f"{k:,} of {dim:,} dimensions"),
            ("fingerprint", book.fingerprint),
            ("bytes", f"{sum(file_size(path / name) for name in files):,}"),
        ],
    )
    return k


def _checked_encoder(path: Path | UPath, sha256: str) -> str:
    """The file of an imported tokenizer's encoder. Raises DataError if it is missing or was changed."""
    from .tokenizers.published import ENCODER

    if not exists(path / ENCODER) or sha256_file(path / ENCODER) != sha256:
        raise DataError(f"{path / ENCODER} is missing or was changed since it was written; import the tokenizer again.")
    return ENCODER


def _check_store(store: TokenStore, sources: Sources | None) -> tuple[int, list[str]]:
    """Returns the number of images, and the problems of the store and its source."""
    problems = _check_embedded(store)
    keys = KeyLedger()
    filled = _FilledImages(store.k)
    with progress("verifying", len(store.entries), "shards") as advance:
        for name in store.entries:
            problems += _check_shard(store, name, keys, sources, filled)
            advance(1)
    problems += _repeated_keys(store, keys)
    problems += filled.problems()
    if sources is not None:
        problems += [f"{name} of --images is not in the store" for name in sources if name not in store.entries]
    listed = {entry["file"] for entry in store.entries.values()}
    foreign = sorted(shard_files(store.path) - listed)
    problems += [f"{store.path / name} is not in the manifest" for name in foreign]
    images = sum(map(keys.count, store.entries))
    if images != len(store) and not problems:
        problems.append(f"the manifest states {len(store)} images and the shards hold {images}")
    return images, problems


def _repeated_keys(store: TokenStore, keys: KeyLedger) -> list[str]:
    """The problems of shards that hold keys of an earlier one."""
    places = {name: place for place, name in enumerate(store.entries)}
    repeated: dict[str, set[str]] = {}
    for pair in keys.sharing():
        _, later = sorted(pair, key=places.__getitem__)
        first, second = (set(store.read_keys(name)) for name in pair)
        if first & second:
            repeated.setdefault(later, set()).update(first & second)
    return [
        f"{name} holds {len(doubled)} keys that another shard holds too, such as {min(doubled)!r}"
        for name, doubled in repeated.items()
    ]


def _summary(
    store: TokenStore,
    images: int,
    codebook: str | Path | None,
    sources: Sources | None,
    again: "Reencoding | None",
    seconds: float,
) -> None:
    names = ["manifest", "codebook.json", "shards"]
    names += ["centroids"] if codebook is not None else []
    names += ["source images"] if sources is not None else []
    checked = sum(entry["bytes"] for entry in store.entries.values())
    checked += sum(entry["source"]["size"] or 0 for entry in store.entries.values()) if sources is not None else 0
    rows = [
        ("store", str(store.path)),
        ("shards", f"{len(store.entries)}, all whole"),
        ("images", f"{images:,} and {len(store.skipped()):,} skipped"),
        ("codebook", store.fingerprint),
        ("checked", ", ".join(names)),
        ("bytes", f"{checked:,} in {seconds:.1f} s ({checked / 1e6 / max(seconds, 1e-9):,.1f} MB/s)"),
    ]
    if again:
        rows.append(("encoded again", again.summary()))
    table("Verified", rows)


def _same_codebook(store: TokenStore, path: str | Path) -> "SavedTokenizer":
    from .tokenizers.opening import read_tokenizer

    saved = read_tokenizer(path)
    if saved.fingerprint != store.fingerprint:
        raise FingerprintMismatch(
            f"{store.path} was made with codebook {store.fingerprint[:12]}; --codebook is {saved.fingerprint[:12]}."
        )
    return saved


def _check_embedded(store: TokenStore) -> list[str]:
    path = store.path / "codebook.json"
    problems = []
    if sha256_file(path) != store.manifest["codebook_sha256"]:
        problems.append(f"{path} is not the one the manifest was written with")
    if read_description(path)["fingerprint"] != store.fingerprint:
        problems.append(f"{path} has another fingerprint than the manifest")
    return problems


@dataclass
class _FilledImages:
    """Finds images that have no tokens but 65535 in a store of K = 65,536, in which 65535 is a token like any other.

    Earlier versions wrote it for every patch of an image whose features held NaN. A code that is really used occurs in
    parts of other images as well.
    """

    k: int
    images: int = 0
    first: str = ""
    elsewhere: bool = False
    """Whether an image has the token at some of its patches only."""

    def add(self, name: str, rows: ShardRows) -> None:
        if self.k != MAX_K_OF_UINT16 or not rows.tokens.size:
            return
        last = (rows.tokens == MAX_K_OF_UINT16 - 1).reshape(len(rows), -1)
        whole = np.flatnonzero(last.all(axis=1))
        self.elsewhere |= int(last.sum()) > len(whole) * last.shape[1]
        if len(whole):
            self.first = self.first or f"{rows.keys[whole[0]]!r} in {name}"
            self.images += len(whole)

    def problems(self) -> list[str]:
        if not self.images or self.elsewhere:
            return []
        return [
            f"{self.images} image(s) have token {MAX_K_OF_UINT16 - 1} at every patch and no other image has it "
            f"({self.first} is the first): their features held NaN; check the tower and encode into another --out"
        ]


def _check_shard(
    store: TokenStore, name: str, keys: KeyLedger, sources: Sources | None, filled: _FilledImages
) -> list[str]:
    """Lists the problems of a shard and its source. Adds its keys to `keys`."""
    try:
        if read_entry(store.path, name) != store.entries[name]:
            return [f"shards/{name}.json differs from its entry in the manifest"]
        rows = store.read_rows(name, every_byte=True)
        problems = _check_rows(store, name, rows)
        filled.add(name, rows)
        keys.add(name, rows.keys)
        if sources is not None:
            problems += _check_source(store, name, rows, sources.get(name))
    except MapetError as error:
        return [str(error).rstrip(".")]
    return problems


def _check_rows(store: TokenStore, name: str, rows: ShardRows) -> list[str]:
    entry = store.entries[name]
    problems = []
    if len(rows) != entry["images"] or len(set(rows.keys)) != len(rows):
        problems.append(f"{name} does not hold {entry['images']} different keys")
    if rows.tokens.shape[2:] != store.grid or rows.tokens.dtype != store.dtype:
        problems.append(f"{name} has tokens of {rows.tokens.dtype} {rows.tokens.shape} for a {store.grid} grid")
    if entry["view"] != store.view or rows.flips.shape[1] != entry["view"]["views"]:
        problems.append(f"{name} has other views than the rest of the store")
    if entry["codebook_fingerprint"] != store.fingerprint:
        problems.append(
            f"{name} was made with codebook {entry['codebook_fingerprint'][:12]}, not {store.fingerprint[:12]}"
        )
    return problems


def _check_source(store: TokenStore, name: str, rows: ShardRows, source: SourceShard | None) -> list[str]:
    if source is None:
        return [f"{name} has no source in --images"]
    entry = store.entries[name]
    problems: list[str] = []
    unusable: Skipped = []
    listed = {tuple(pair) for pair in entry.get("skipped", ())}
    with source.staged() as here:
        if here.sha256(skip=bool(listed)) != entry["source"]["sha256"]:
            problems.append(f"{source.title} ({name}) is not the one that was encoded (its digest differs)")
        records = {record.key: record for record in here.index(unusable)}
        ambiguous = {key for key, _ in [*listed, *unusable]}
        images = (
            _check_image(records.get(key), key, int(crc), key in ambiguous)
            for key, crc in zip(rows.keys, rows.crc32, strict=True)
        )
        problems += [f"{name}: {problem}" for problem in islice(filter(None, images), 1)]
        known = {*rows.keys, *(key for key, _ in listed)}
        foreign = [key for key in records if key not in known]
        problems += [f"{name}: image {key!r} is neither in the store nor listed as skipped" for key in foreign]
        problems += [
            f"{source.title} {reason}"
            for key, reason in unusable
            if (key, reason) not in listed and (not key or key not in known)
        ]
    return problems


def _check_image(record: ImageRecord | None, key: str, expected: int, ambiguous: bool) -> str | None:
    if record is None and ambiguous:
        return (
            f"image {key!r} has several pictures in the source and an earlier version took the first; encode it again "
            "with --image-field or --key-until"
        )
    if record is None:
        return f"image {key!r} is not in the source"
    if crc32(read_bytes(record)) != expected:
        return f"image {key!r} has other bytes than when it was encoded"
    return None
