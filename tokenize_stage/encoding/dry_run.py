"""encode-shards --dry-run: hours, bytes and rows of an encoding, from measured batches."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from itertools import islice
from pathlib import Path

from ...shared.images.sources import KeyLedger, SourceShard
from ...shared.runtime.console import say, table
from ...shared.tokens.rows import ShardRows, concatenate_rows, empty_rows
from ...shared.tokens.store import WEBDATASET, write_shard
from ...shared.tokens.tar_shard import bytes_of_tar
from ..towers.features import Request, group_requests
from .shards import Encoder, as_rows

_BATCHES = 10


def estimate(encoder: Encoder, shards: Sequence[SourceShard], ledger: KeyLedger, processes: int, storage: str) -> None:
    """Encodes ten batches, after one that is not timed, and prints what all shards would take.

    Nothing is written to the store. The bytes are those of a shard that holds the measured rows.
    """
    rows, rate, batches = _measure(encoder, shards)
    a_shard = _bytes_on_disk(empty_rows(encoder.policy.views, encoder.tower.grid), storage)
    an_image = (_bytes_on_disk(rows, storage) - a_shard) / max(len(rows), 1)
    surveyed = [ledger.count(shard.name) for shard in shards if shard.name in ledger]
    total = sum(surveyed)
    if len(surveyed) < len(shards):
        say("Remote shards were not opened; they are taken to hold as many images as the others.")
        total = round(len(shards) * (total / len(surveyed) if surveyed else len(rows)))
    views = encoder.policy.views
    duration = timedelta(seconds=round(total / rate / processes))
    table(
        "Dry run: nothing was written",
        [
            ("measured", f"{batches} batches, {rate:,.1f} images/s ({rate * views:,.1f} views/s) in one process"),
            ("rows", f"{total:,} images x {views} views in {len(shards)} shards"),
            ("time", f"{duration} (h:mm:ss) with {processes} process(es) like this one"),
            ("bytes", f"{round(an_image * total + a_shard * len(shards)):,} ({an_image:,.0f} an image)"),
        ],
    )


def _measure(encoder: Encoder, shards: Sequence[SourceShard]) -> tuple[ShardRows, float, int]:
    """(rows, images a second, batches timed) of the first batches, from as many shards as that needs."""
    asked: list[SourceShard] = []
    with ExitStack() as files:

        def groups() -> Iterator[Sequence[Request]]:
            for shard in shards:
                here = files.enter_context(shard.staged())
                requests = [Request(record) for record in here.index([] if encoder.skip else None)]
                for group in group_requests(requests, encoder.policy, encoder.batch_size):
                    asked.append(here)
                    yield group

        parts, times = [], [time.monotonic()]
        for batch, tokens in encoder.batches(islice(groups(), _BATCHES + 1)):
            parts.append(as_rows(asked[len(parts)], batch, tokens))
            times.append(time.monotonic())
    # The first batch also pays for starting; a source of one batch has no other.
    first = 1 if len(parts) > 1 else 0
    images = sum(map(len, parts[first:]))
    return concatenate_rows(parts), images / (times[-1] - times[first]), len(parts) - first


def _bytes_on_disk(rows: ShardRows, storage: str) -> int:
    if storage == WEBDATASET:
        return bytes_of_tar(rows)
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        write_shard(Path(folder), "measured", rows, {})
        return sum(path.stat().st_size for path in Path(folder, "shards").iterdir())
