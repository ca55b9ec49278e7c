"""Writes a token store: its embedded tokenizer first, then shard by shard, the manifest last."""

from collections.abc import Sequence
from pathlib import Path

from upath import UPath

from ...shared.errors import DataError
from ...shared.images.views import ViewPolicy
from ...shared.runtime.console import progress, say
from ...shared.sources.keys import KeyLedger
from ...shared.sources.sources import SourceShard
from ...shared.storage.files import write_sealed_json
from ...shared.storage.remote import exists, explained
from ...shared.tokens.codebook import read_description
from ...shared.tokens.rows import ShardRows
from ...shared.tokens.shard_files import read_shard
from ...shared.tokens.store import (
    WEBDATASET,
    TokenStore,
    entry_path,
    read_entry,
    stored_entries,
    write_manifest,
    write_shard,
)
from .shards import Encoder


def begin_store(out: Path | UPath, encoder: Encoder) -> None:
    """Embeds the tokenizer's description, and removes the manifest if views are about to be added."""
    manifest = out / "manifest.json"
    view = encoder.policy.to_json()
    if exists(manifest) and any(entry["view"] != view for entry in TokenStore(out).entries.values()):
        # Its shards are about to change; a store without a manifest counts as unfinished.
        with explained(manifest):
            manifest.unlink()
    if not exists(out / "codebook.json"):
        write_sealed_json(out / "codebook.json", encoder.tokenizer.description)


def write_shards(
    out: Path | UPath, encoder: Encoder, shards: Sequence[SourceShard], ledger: KeyLedger, format: str
) -> None:
    """Encodes `shards` and writes each as soon as it is whole; views that are stored already are kept."""
    counted = all(shard.name in ledger for shard in shards)
    with progress("encoding", sum(ledger.count(shard.name) for shard in shards) if counted else None) as advance:
        for shard in encoder.encode(shards, lambda name: _stored_rows(out, name, encoder.policy), advance):
            attributes = {
                "codebook_fingerprint": encoder.tokenizer.fingerprint,
                "view": encoder.policy.to_json(),
                "source": shard.source,
                "skipped": [list(pair) for pair in shard.skipped],
            }
            if shard.unlabelled:
                attributes["unlabelled"] = [list(pair) for pair in shard.unlabelled]
            if shard.labels:
                attributes["labels"] = shard.labels
            write_shard(out, shard.name, shard.rows, attributes, shard.images if format == WEBDATASET else None)


def _stored_rows(out: Path | UPath, name: str, policy: ViewPolicy) -> ShardRows | None:
    """The rows of a shard that has some of the views already; None where it has none that are undamaged."""
    if not exists(entry_path(out, name)):
        return None
    entry = read_entry(out, name)
    if entry["view"]["views"] >= policy.views:
        return None
    try:
        return read_shard(out, entry)
    except DataError as error:
        say(f"{error} All its views are encoded again.")
        return None


def finish_store(out: Path | UPath, shards: Sequence[SourceShard], ledger: KeyLedger, *, changed: bool) -> None:
    """Writes the manifest. Raises DataError for a key that two shards have, or for a shard that has disappeared."""
    manifest = out / "manifest.json"
    if exists(manifest) and not changed:
        return
    entries = stored_entries(out)
    lost = [shard.name for shard in shards if shard.name not in entries]
    if lost:
        raise DataError(f"{entry_path(out, lost[0])} is gone, though it was written; give the same command again.")
    for name, entry in entries.items():
        if name not in ledger:
            ledger.add(name, read_shard(out, entry).keys)
    ledger.refuse_doubles(lambda name: read_shard(out, entries[name]).keys)
    if not any(entry["images"] for entry in entries.values()):
        reasons = [reason for entry in entries.values() for _, reason in entry.get("skipped", ())]
        first = f", the first: {reasons[0]}" if reasons else ""
        raise DataError(f"{out} would hold no images: {len(reasons):,} were left out{first}; check the images.")
    description = read_description(out / "codebook.json")
    write_manifest(out, description, [entries[name] for name in sorted(entries)])
