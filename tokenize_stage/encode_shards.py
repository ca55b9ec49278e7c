"""encode-shards: every image of a source -> its tokens, in one shard of the token store per shard of the source."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.codebook import TOKEN_FIELDS, Codebook, read_description
from ..shared.console import Advance, progress, say, table
from ..shared.devices import choose_device, choose_workers, refuse_many_processes
from ..shared.errors import DataError, FingerprintMismatch, UsageError
from ..shared.files import sha256_file, write_sealed_json
from ..shared.images import SourceShard, open_source
from ..shared.token_store import NO_LABEL, ShardRows, TokenStore, entry_path, read_entry, write_manifest, write_shard
from ..shared.views import center_box
from .extract import extract
from .towers import Tower, TowerSettings, open_tower

CROPS = ("center",)


def encode_shards(
    images: str | Path | Sequence[str | Path],
    codebook: str | Path,
    out: str | Path,
    *,
    crop: str = "center",
    tower: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
) -> TokenStore:
    """Writes the tokens of every image to the token store `out`; shards that are whole are skipped.

    Args:
        images: as for `build_codebook`.
        codebook: folder that `build_codebook` wrote.
        out: folder of the token store.
        crop: which view of an image is encoded; "center" is the tower's own preprocessing.
        tower: where the codebook's tower is now, if it moved; it must have the same weights.
        batch_size, workers, device: how to run.

    Raises:
        FingerprintMismatch if `out` was begun with another codebook or the tower is not the codebook's; DataError for
        images that cannot be read or a source that changed; UsageError for options that cannot be.
    """
    refuse_many_processes()
    if crop not in CROPS:
        raise UsageError(f"--crop {crop} is unknown; choose {' or '.join(CROPS)}.")
    shards = open_source(images)
    book, out, view = Codebook.load(codebook), Path(out), {"crop": crop, "views": 1}
    _refuse_foreign(out, book, codebook)
    todo = [shard for shard in shards if not _is_whole(out, shard, book, view)]
    if len(todo) < len(shards):
        say(f"{len(shards) - len(todo)} of {len(shards)} shards are whole already.")
    if todo:
        opened = _open_same_tower(book, tower, choose_device(device))
        if not (out / "codebook.json").exists():
            digest = sha256_file(Path(codebook) / "centroids.safetensors")
            write_sealed_json(out / "codebook.json", book.as_json(digest))
        _encode_all(out, todo, book, opened, view, batch_size, workers)
    entries = [read_entry(out, shard.name) for shard in shards]
    known = {entry["name"] for entry in entries}
    if todo or not (out / "manifest.json").exists():
        old = TokenStore(out).manifest["shards"] if (out / "manifest.json").exists() else []
        entries += [entry for entry in old if entry["name"] not in known]
        write_manifest(out, read_description(out / "codebook.json"), sorted(entries, key=lambda entry: entry["name"]))
    store = TokenStore(out)
    _summary(store, len(todo))
    return store


def _refuse_foreign(out: Path, book: Codebook, path: str | Path) -> None:
    embedded = out / "codebook.json"
    if embedded.exists():
        before = read_description(embedded)["fingerprint"]
        if before != book.fingerprint:
            raise FingerprintMismatch(
                f"{out} was begun with codebook {before[:12]} and --codebook {path} is {book.fingerprint[:12]}; "
                "choose another --out or the same codebook."
            )
    elif out.exists() and any(path.name != f".{embedded.name}.partial" for path in out.iterdir()):
        raise UsageError(f"{out} is not empty and no token store; choose another --out.")


def _is_whole(out: Path, shard: SourceShard, book: Codebook, view: dict[str, Any]) -> bool:
    if not entry_path(out, shard.name).exists():
        return False
    entry = read_entry(out, shard.name)
    path = out / entry["file"]
    if not path.exists() or path.stat().st_size != entry["bytes"]:
        return False
    if entry["codebook_fingerprint"] != book.fingerprint or entry["view"] != view:
        raise FingerprintMismatch(f"{path} was encoded with other settings ({entry['view']}); choose another --out.")
    if entry["source"]["size"] != shard.size():
        raise DataError(
            f"{shard.root} has {shard.size()} bytes and had {entry['source']['size']} when {path} was encoded; "
            f"delete {path.name} and its .json to encode it again, or restore the source."
        )
    return True


def _open_same_tower(book: Codebook, tower: str | None, device: str) -> Tower:
    about = book.description
    recorded = TowerSettings(**{name: about[name] for name in TowerSettings.__dataclass_fields__})
    opened = open_tower(replace(recorded, tower=tower) if tower else recorded, device)
    for name, value in opened.description().items():
        if name in TOKEN_FIELDS and value != about[name]:
            raise FingerprintMismatch(
                f"--tower {opened.settings.tower} is not the tower of the codebook: its {name} is {value}, "
                f"the codebook's {about[name]}."
            )
    return opened


def _encode_all(
    out: Path,
    shards: list[SourceShard],
    book: Codebook,
    tower: Tower,
    view: dict[str, Any],
    batch_size: int,
    workers: int | None,
) -> None:
    processes = choose_workers(workers, tower.device.type)
    with progress("encoding", sum(len(shard.records) for shard in shards)) as advance:
        for shard in shards:
            digest = shard.sha256()
            rows = _encode(shard, book, tower, batch_size, processes, advance)
            source = {"kind": "tar" if shard.is_tar else "folder", "size": shard.size(), "sha256": digest}
            attributes = {"codebook_fingerprint": book.fingerprint, "view": view, "source": source}
            write_shard(out, shard.name, rows, attributes)


def _encode(
    shard: SourceShard, book: Codebook, tower: Tower, batch_size: int, workers: int, advance: Advance
) -> ShardRows:
    tokens, sizes, checksums = [], [], []
    for batch in extract(tower, shard.records, batch_size, workers, book.description["metric"]):
        count = len(batch.features)
        found, _ = book.assign(batch.features.reshape(-1, tower.dim))
        tokens.append(found.reshape(count, 1, *tower.grid))
        sizes.append(batch.sizes)
        checksums.append(batch.crc32)
        advance(count)
    heights_widths = np.concatenate(sizes)
    boxes = [center_box(tower.preprocess, int(width), int(height)) for height, width in heights_widths]
    records = shard.records
    return ShardRows(
        keys=np.array([record.key for record in records], dtype=object),
        tokens=np.concatenate(tokens),
        crops=np.array(boxes, dtype=np.float64)[:, None],
        flips=np.zeros((len(records), 1), dtype=bool),
        sizes=heights_widths,
        labels=np.array([NO_LABEL if record.label is None else record.label for record in records], dtype=np.int64),
        paths=np.array(
            ["" if shard.is_tar else record.path.relative_to(shard.root).as_posix() for record in records], dtype=object
        ),
        offsets=np.array([record.offset for record in records], dtype=np.int64),
        lengths=np.array([record.length for record in records], dtype=np.int64),
        crc32=np.concatenate(checksums),
    )


def _summary(store: TokenStore, encoded: int) -> None:
    written = sum(entry["bytes"] for entry in store.entries.values())
    table(
        "Token store",
        [
            ("images", f"{len(store):,} in {len(store.entries)} shards ({encoded} encoded now)"),
            ("tokens", f"{store.grid[0]}x{store.grid[1]} an image, K={store.k}"),
            ("codebook", store.fingerprint),
            ("size", f"{written:,} bytes ({written / max(len(store), 1):.0f} an image)"),
            ("written to", str(store.path)),
        ],
    )
