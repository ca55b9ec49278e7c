"""encode-shards --dry-run: hours, bytes and rows of an encoding, from measured batches."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ..shared.console import say, table
from ..shared.images import ImageRecord
from ..shared.sources import KeyLedger, SourceShard
from ..shared.token_store import concatenate_rows, write_shard
from .encoder import Encoder

_BATCHES = 10


def estimate(encoder: Encoder, shards: Sequence[SourceShard], ledger: KeyLedger, processes: int) -> None:
    """Encodes ten batches (and one before them, which is not timed) and prints what all shards would take.

    Nothing is written to the store. The bytes are those of a shard that holds the measured rows.
    """
    images_a_batch = max(1, encoder.batch_size // encoder.policy.views)
    parts, seconds, images = [], [], 0
    for shard, records in _some_records(shards, images_a_batch):
        began = time.monotonic()
        for batch, tokens in encoder.batches(records):
            parts.append(encoder.rows(shard, batch, tokens))
        seconds.append(time.monotonic() - began)
        images += len(records)
    timed = seconds[1:] or seconds
    rate = images / len(seconds) / (sum(timed) / len(timed))
    rows = concatenate_rows(parts)
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        write_shard(Path(folder), "measured", rows, {})
        written = sum(path.stat().st_size for path in Path(folder, "shards").iterdir())
    surveyed = [shard for shard in shards if shard.name in ledger]
    total = sum(ledger.count(shard.name) for shard in surveyed)
    if len(surveyed) < len(shards):
        total = round(total + (len(shards) - len(surveyed)) * (total / len(surveyed) if surveyed else images))
        say("Remote shards were not opened; their images are counted as those of the others.")
    views = encoder.policy.views
    table(
        "Dry run: nothing was written",
        [
            ("measured", f"{len(timed)} batches, {rate:,.1f} images/s ({rate * views:,.1f} views/s) in one process"),
            ("to encode", f"{total:,} images x {views} views in {len(shards)} shards"),
            ("rows", f"{total:,} ({total * views:,} views)"),
            ("time", f"{total / rate / processes / 3600:,.2f} hours with {processes} process(es) like this one"),
            ("bytes", f"{round(written / max(len(rows), 1) * total):,} ({written / max(len(rows), 1):,.0f} an image)"),
        ],
    )


def _some_records(
    shards: Sequence[SourceShard], images_a_batch: int
) -> Iterator[tuple[SourceShard, list[ImageRecord]]]:
    """Records for the batches to measure, batch by batch, from as many shards as that needs."""

    def batches() -> Iterator[tuple[SourceShard, list[ImageRecord]]]:
        for shard in shards:
            with shard.staged() as here:
                records = here.index([])
                for start in range(0, len(records), images_a_batch):
                    yield here, records[start : start + images_a_batch]

    yield from islice(batches(), _BATCHES + 1)
