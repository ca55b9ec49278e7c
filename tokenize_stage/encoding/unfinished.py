"""Finds the source shards that a token store lacks, and refuses to mix different encodings in one store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upath import UPath

from ...shared.errors import DataError, FingerprintMismatch, UsageError
from ...shared.images.views import ViewPolicy
from ...shared.runtime.console import progress
from ...shared.runtime.distributed import World
from ...shared.sources.keys import KeyLedger, Skipped
from ...shared.sources.passed import PassedOver
from ...shared.sources.sources import SourceShard, say_passed_over
from ...shared.storage.remote import exists, explained, file_size
from ...shared.tokens.codebook import read_description
from ...shared.tokens.store import stored_entries


def unfinished_shards(
    out: Path | UPath,
    shards: Sequence[SourceShard],
    fingerprint: str,
    codebook: str | Path,
    policy: ViewPolicy,
    format: str,
) -> list[int]:
    """Indices of the shards that the store `out` lacks, that are damaged, or that have fewer views than asked for.

    `fingerprint` is that of the tokenizer in the folder `codebook`, which messages name.

    Raises:
        FingerprintMismatch: the store was begun with another tokenizer or other views.
        UsageError: the folder is not a token store, has another format, or has more views.
        DataError: a source changed since it was encoded.
    """
    embedded = out / "codebook.json"
    if exists(embedded):
        stored = read_description(embedded)["fingerprint"]
        if stored != fingerprint:
            raise FingerprintMismatch(
                f"{out} was begun with codebook {stored[:12]} and --codebook {codebook} is {fingerprint[:12]}; "
                "choose another --out or the same codebook."
            )
    elif _holds_files(out, besides=f".{embedded.name}.partial"):
        raise UsageError(f"{out} is not empty and not a token store; choose another --out.")
    view, entries = policy.to_json(), stored_entries(out)
    _refuse_mixture(out, entries, {shard.name for shard in shards}, fingerprint, view, format)
    return [
        index
        for index, shard in enumerate(shards)
        if shard.name not in entries or _whole_views(out, shard, entries[shard.name], fingerprint, view) < policy.views
    ]


def _refuse_mixture(
    out: Path | UPath,
    entries: dict[str, dict[str, Any]],
    names: set[str],
    fingerprint: str,
    view: dict[str, Any],
    format: str,
) -> None:
    """All shards of a store have one codebook, one format and the same views, also those not among `names` now."""
    for name, entry in entries.items():
        if name not in names and entry["codebook_fingerprint"] != fingerprint:
            raise FingerprintMismatch(
                f"{out} also holds shard {name}, made with codebook {entry['codebook_fingerprint'][:12]} and not "
                f"{fingerprint[:12]}; delete shards/{name}.json, or choose another --out."
            )
        if entry["storage"] != format:
            raise UsageError(
                f"{out} was begun with --format {entry['storage']} and now --format {format} is given; "
                "give the same format or choose another --out."
            )
        if name not in names and entry["view"] != view:
            raise UsageError(
                f"{out} also holds shard {name}, with other views ({entry['view']}) than are asked for now; "
                "give its images, too, to add views, or choose another --out."
            )


def _holds_files(out: Path | UPath, besides: str) -> bool:
    with explained(out):
        return out.exists() and any(path.name != besides for path in out.iterdir())


def _whole_views(
    out: Path | UPath, shard: SourceShard, entry: dict[str, Any], fingerprint: str, view: dict[str, Any]
) -> int:
    """Number of views of a shard that are stored and whole; refuses a shard that was encoded differently."""
    path = out / entry["file"]
    if not exists(path) or file_size(path) != entry["bytes"]:
        return 0
    stored = entry["view"]
    if entry["codebook_fingerprint"] != fingerprint or {**stored, "views": 0} != {**view, "views": 0}:
        raise FingerprintMismatch(f"{path} was encoded with other settings ({stored}); choose another --out.")
    views: int = stored["views"]
    if views > view["views"]:
        raise UsageError(f"{path} holds {views} views already; give --views {views} or more.")
    labels = shard.labelling.to_json() if shard.labelling else None
    if entry.get("labels") != labels:
        then = "with" if entry.get("labels") else "without"
        now = "others are given" if labels and entry.get("labels") else "they are given" if labels else "none are given"
        raise UsageError(
            f"{path} was encoded {then} --labels or --label-field and now {now}; give the same ones or choose another "
            "--out."
        )
    size = shard.size()
    if size is not None and entry["source"]["size"] != size:
        raise DataError(
            f"{shard.title} has {size} bytes and had {entry['source']['size']} when {path} was encoded; "
            f"delete {path.name} and its .json to encode it again, or restore the source."
        )
    return views


def survey_keys(shards: Sequence[SourceShard], world: World, skip: bool) -> KeyLedger:
    """Reads the keys of all local shards from their headers, each process those of its share.

    A duplicate key or a cut tar thus raises a DataError before any image is encoded.
    """
    ledger, passed = KeyLedger(), PassedOver()
    unusable: Skipped = []
    local = [shard for shard in shards if not shard.is_remote]
    with progress("reading headers", len(local), "shards") as advance:
        for shard in world.shard(local):
            records = shard.index(unusable if skip else None, passed=passed)
            ledger.add(shard.name, (record.key for record in records))
            advance(world.size)
    everything, left_out = PassedOver(), Skipped()
    for others, of_process, problems in world.all_gather((ledger, passed, unusable)):
        ledger.merge(others)
        everything.merge(of_process)
        left_out += problems
    say_passed_over(everything)
    named = {shard.name: shard for shard in local}
    world.on_rank_zero(lambda: ledger.refuse_doubles(lambda name: [record.key for record in named[name].index([])]))
    if len(local) == len(shards) and not any(ledger.count(shard.name) for shard in local):
        reason = f"the first: {local[0].title} {left_out[0][1]}" if left_out else "they hold none"
        raise DataError(f"None of the images can be used, {reason}; nothing was written.")
    return ledger
