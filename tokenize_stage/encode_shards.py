"""encode-shards: every image of a source -> its tokens, in one shard of the token store per shard of the source."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..shared.errors import DataError, FingerprintMismatch, UsageError
from ..shared.images.sources import KeyLedger, SourceShard, open_source
from ..shared.images.views import ViewPolicy
from ..shared.runtime.console import progress, say, table
from ..shared.runtime.devices import choose_device, choose_workers
from ..shared.runtime.distributed import World, joined_world
from ..shared.storage.files import sha256_file, write_sealed_json
from ..shared.storage.remote import as_path, exists, explained, file_size
from ..shared.tokens.codebook import Codebook, read_description
from ..shared.tokens.rows import ShardRows
from ..shared.tokens.store import (
    SUFFIXES,
    WEBDATASET,
    ZARR,
    TokenStore,
    entry_path,
    read_entry,
    read_shard,
    stored_entries,
    write_manifest,
    write_shard,
)
from .encoding.dry_run import estimate
from .encoding.shards import Encoder
from .tokenizers.kclip import open_same_tower
from .towers.on_error import skips


def encode_shards(
    images: str | Path | Sequence[str | Path],
    codebook: str | Path,
    out: str | Path,
    *,
    crop: str = "center",
    views: int = 1,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
    flip: float = 0.5,
    with_center: bool = False,
    seed: int = 0,
    format: str = ZARR,
    on_error: str = "stop",
    dry_run: bool = False,
    tower: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
) -> TokenStore | None:
    """Writes the tokens of every image to the token store `out`; what is whole there is kept.

    Calling it again adds new source shards to a store and more views to its shards. Under torchrun the source's
    shards are spread over the processes; the store is the same to the last byte.

    Args:
        images: as for `build_codebook`.
        codebook: folder that `build_codebook` wrote.
        out: folder of the token store, or its URL.
        crop, views, scale, ratio, flip, with_center, seed: which views are stored (see `shared.views.ViewPolicy`).
        format: "zarr" stores tokens only, "webdataset" tars with the images beside their tokens.
        on_error: "stop" at what cannot be read, or "skip" it; the store lists what was skipped, and why.
        dry_run: measure some batches and say what encoding would take; nothing is written, None is returned.
        tower: where the codebook's tower is now, if it moved; it must have the same weights.
        batch_size: views for each forward pass of the tower.
        workers, device: how to run.

    Raises:
        FingerprintMismatch if `out` was begun with another codebook or other views, or the tower is not the
        codebook's; DataError for images that cannot be read or a source that changed; UsageError for options that
        cannot be, such as another format than that of `out`.
    """
    policy = ViewPolicy(crop, views, scale, ratio, flip, with_center, seed)
    skip = skips(on_error)
    if format not in SUFFIXES:
        raise UsageError(f"--format {format} is unknown; choose {' or '.join(SUFFIXES)}.")
    out = as_path(out)
    with joined_world() as world:
        shards, book = world.all_or_raise(lambda: (open_source(images), Codebook.load(codebook)))
        todo = world.on_rank_zero(lambda: _unfinished(out, shards, book, codebook, policy, format))
        if len(todo) < len(shards):
            say(f"{len(shards) - len(todo)} of {len(shards)} shards are whole already.")
        ledger = _survey(shards, world, skip)
        if todo:
            opened = world.all_or_raise(lambda: open_same_tower(book, tower, choose_device(device)))
            encoder = Encoder(book, opened, policy, skip, batch_size, choose_workers(workers, opened.device.type))
            unfinished = [shards[place] for place in todo]
            if dry_run:
                world.on_rank_zero(lambda: estimate(encoder, unfinished, ledger, world.size, format))
                return None
            world.on_rank_zero(lambda: _begin(out, encoder, codebook))
            _encode_all(out, encoder, world.shard(unfinished), ledger, format)
            world.wait()
            out = as_path(out)
        elif dry_run:
            say(f"{out} holds all of it already; nothing is left to do.")
            return None
        world.on_rank_zero(lambda: _finish(out, shards, ledger, changed=bool(todo)))
        store = TokenStore(out)
        if world.is_first:
            _summary(store, len(todo))
        return store


def _unfinished(
    out: Path, shards: Sequence[SourceShard], book: Codebook, codebook: str | Path, policy: ViewPolicy, format: str
) -> list[int]:
    """Places of the shards that are missing, damaged or short of views; refuses a store of something else."""
    embedded = out / "codebook.json"
    if exists(embedded):
        before = read_description(embedded)["fingerprint"]
        if before != book.fingerprint:
            raise FingerprintMismatch(
                f"{out} was begun with codebook {before[:12]} and --codebook {codebook} is {book.fingerprint[:12]}; "
                "choose another --out or the same codebook."
            )
    elif _holds_something(out, besides=f".{embedded.name}.partial"):
        raise UsageError(f"{out} is not empty and no token store; choose another --out.")
    view, entries = policy.to_json(), stored_entries(out)
    _refuse_mixture(out, entries, {shard.name for shard in shards}, view, format)
    return [
        place
        for place, shard in enumerate(shards)
        if shard.name not in entries or _whole_views(out, shard, entries[shard.name], book, view) < policy.views
    ]


def _refuse_mixture(
    out: Path, entries: dict[str, dict[str, Any]], given: set[str], view: dict[str, Any], format: str
) -> None:
    """All shards of a store have one format and the same views, those that are not `given` now included."""
    for name, entry in entries.items():
        if entry["storage"] != format:
            raise UsageError(
                f"{out} was begun with --format {entry['storage']} and now --format {format} is given; "
                "give the same format or choose another --out."
            )
        if name not in given and entry["view"] != view:
            raise UsageError(
                f"{out} also holds shard {name}, with other views ({entry['view']}) than are asked for now; "
                "give its images, too, to add views, or choose another --out."
            )


def _holds_something(out: Path, besides: str) -> bool:
    with explained(out):
        return out.exists() and any(path.name != besides for path in out.iterdir())


def _whole_views(out: Path, shard: SourceShard, entry: dict[str, Any], book: Codebook, view: dict[str, Any]) -> int:
    """How many views of a shard are stored and sound; refuses a shard that was encoded in another way."""
    path = out / entry["file"]
    if not exists(path) or file_size(path) != entry["bytes"]:
        return 0
    before = entry["view"]
    if entry["codebook_fingerprint"] != book.fingerprint or {**before, "views": 0} != {**view, "views": 0}:
        raise FingerprintMismatch(f"{path} was encoded with other settings ({before}); choose another --out.")
    if before["views"] > view["views"]:
        raise UsageError(f"{path} holds {before['views']} views already; give --views {before['views']} or more.")
    size = shard.size()
    if size is not None and entry["source"]["size"] != size:
        raise DataError(
            f"{shard.root} has {size} bytes and had {entry['source']['size']} when {path} was encoded; "
            f"delete {path.name} and its .json to encode it again, or restore the source."
        )
    return before["views"]


def _survey(shards: Sequence[SourceShard], world: World, skip: bool) -> KeyLedger:
    """The keys of all local shards, from headers: a doubled key or a cut tar is found before any work is done."""
    ledger = KeyLedger()
    local = [shard for shard in shards if not shard.is_remote]
    with progress("reading headers", len(local), "shards") as advance:
        for shard in world.shard(local):
            ledger.add(shard.name, (record.key for record in shard.index([] if skip else None)))
            advance(world.size)
    for other in world.all_gather(ledger):
        ledger.merge(other)
    named = {shard.name: shard for shard in local}
    world.on_rank_zero(lambda: ledger.refuse_doubles(lambda name: [record.key for record in named[name].index([])]))
    return ledger


def _begin(out: Path, encoder: Encoder, codebook: str | Path) -> None:
    manifest = out / "manifest.json"
    view = encoder.policy.to_json()
    if exists(manifest) and any(entry["view"] != view for entry in TokenStore(out).entries.values()):
        # Its shards are about to change; a store without a manifest says that it is unfinished.
        with explained(manifest):
            manifest.unlink()
    if not exists(out / "codebook.json"):
        digest = sha256_file(as_path(codebook) / "centroids.safetensors")
        write_sealed_json(out / "codebook.json", encoder.book.as_json(digest))


def _encode_all(out: Path, encoder: Encoder, shards: Sequence[SourceShard], ledger: KeyLedger, format: str) -> None:
    known = all(shard.name in ledger for shard in shards)
    with progress("encoding", sum(ledger.count(shard.name) for shard in shards) if known else None) as advance:
        for shard in encoder.encode(shards, lambda name: _stored_rows(out, name, encoder.policy), advance):
            attributes = {
                "codebook_fingerprint": encoder.book.fingerprint,
                "view": encoder.policy.to_json(),
                "source": shard.source,
                "skipped": [list(pair) for pair in shard.skipped],
            }
            write_shard(out, shard.name, shard.rows, attributes, shard.images if format == WEBDATASET else None)


def _stored_rows(out: Path, name: str, policy: ViewPolicy) -> ShardRows | None:
    """The rows of a shard that has some of the views already; None where there are none that are sound."""
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


def _finish(out: Path, shards: Sequence[SourceShard], ledger: KeyLedger, *, changed: bool) -> None:
    """Assembles the manifest, once no key stands in two shards."""
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
    description = read_description(out / "codebook.json")
    write_manifest(out, description, [entries[name] for name in sorted(entries)])


def _summary(store: TokenStore, encoded: int) -> None:
    written = sum(entry["bytes"] for entry in store.entries.values())
    skipped = store.skipped()
    rows = [
        ("images", f"{len(store):,} in {len(store.entries)} shards ({encoded} encoded now)"),
        ("views", f"{store.views} an image ({store.view['crop']})"),
        ("tokens", f"{store.grid[0]}x{store.grid[1]} a view, K={store.k}"),
        ("codebook", store.fingerprint),
        ("size", f"{written:,} bytes, {store.storage} ({written / max(len(store) * store.views, 1):.0f} a view)"),
        ("written to", str(store.path)),
    ]
    if skipped:
        name, key, reason = skipped[0]
        rows.append(("skipped", f"{len(skipped)}, the first in {name}: {key or '(no key)'}: {reason}"))
    table("Token store", rows)
