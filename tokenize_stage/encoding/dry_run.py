"""Estimates hours, bytes and rows of an encoding from a few measured batches."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ...shared.sources.keys import KeyLedger
from ...shared.sources.sources import SourceShard
from ...shared.tokens.rows import ShardRows, concatenate_rows, take_rows
from ...shared.tokens.store import WEBDATASET, write_shard
from ...shared.tokens.tar_shard import bytes_of_tar
from ..towers.features import Request, group_requests
from .shards import Encoder, as_rows

_BATCHES = 10


@dataclass(frozen=True)
class EncodingEstimate:
    """An estimate of the work to encode the shards that a token store lacks; zero where it lacks none."""

    store: str
    """Path or URL of the token store."""
    shards: int
    """Source shards that are still to be encoded."""
    images: int
    """Their images."""
    views: int
    """Views per image."""
    processes: int
    """Processes that share the work, all as fast as the measured one."""
    batches: int
    """Batches that were timed."""
    images_per_second: float
    """Of one process."""
    seconds: float
    """Of all processes together, by the clock."""
    bytes: int
    """Size of the new shards on disk."""
    bytes_per_image: float
    uncounted_shards: int
    """Remote shards that were not opened; each is assumed to hold as many images as the others on average."""


def nothing_left(store: str, views: int, processes: int) -> EncodingEstimate:
    """The estimate for a store that lacks no shard."""
    return EncodingEstimate(store, 0, 0, views, processes, 0, 0.0, 0.0, 0, 0.0, 0)


def estimate_encoding(
    encoder: Encoder, store: str, shards: Sequence[SourceShard], ledger: KeyLedger, processes: int, storage: str
) -> EncodingEstimate:
    """Encodes one batch untimed and ten timed, and extrapolates to all of `shards`; writes nothing to the store.

    `ledger` holds the keys of the shards whose headers were read, `storage` is the format of the store. Bytes are
    measured on a temporary shard that holds the encoded rows.
    """
    rows, rate, batches = _measure(encoder, shards)
    bytes_per_shard = _bytes_on_disk(take_rows(rows, []), storage)
    bytes_per_image = (_bytes_on_disk(rows, storage) - bytes_per_shard) / max(len(rows), 1)
    counts = [ledger.count(shard.name) for shard in shards if shard.name in ledger]
    images = sum(counts)
    if len(counts) < len(shards):
        images = round(len(shards) * (images / len(counts) if counts else len(rows)))
    return EncodingEstimate(
        store=store,
        shards=len(shards),
        images=images,
        views=encoder.policy.views,
        processes=processes,
        batches=batches,
        images_per_second=rate,
        seconds=images / rate / processes,
        bytes=round(bytes_per_image * images + bytes_per_shard * len(shards)),
        bytes_per_image=bytes_per_image,
        uncounted_shards=len(shards) - len(counts),
    )


def _measure(encoder: Encoder, shards: Sequence[SourceShard]) -> tuple[ShardRows, float, int]:
    """(rows, images per second, batches timed) of the first batches, from as many shards as they need."""
    batch_shards: list[SourceShard] = []
    with ExitStack() as files:

        def groups() -> Iterator[Sequence[Request]]:
            for shard in shards:
                here = files.enter_context(shard.staged())
                requests = [Request(record) for record in here.index([] if encoder.skip else None)]
                for group in group_requests(requests, encoder.policy, encoder.batch_size):
                    batch_shards.append(here)
                    yield group

        parts: list[ShardRows] = []
        times = [time.monotonic()]
        for batch, tokens in encoder.batches(islice(groups(), _BATCHES + 1)):
            parts.append(as_rows(batch_shards[len(parts)], batch, tokens))
            times.append(time.monotonic())
    # The first batch includes the start of the workers, but a source of one batch has no other to measure.
    first = 1 if len(parts) > 1 else 0
    images = sum(map(len, parts[first:]))
    return concatenate_rows(parts), images / (times[-1] - times[first]), len(parts) - first


def _bytes_on_disk(rows: ShardRows, storage: str) -> int:
    if storage == WEBDATASET:
        return bytes_of_tar(rows)
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        write_shard(Path(folder), "measured", rows, {})
        return sum(path.stat().st_size for path in Path(folder, "shards").iterdir())
