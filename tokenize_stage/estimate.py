"""encode-shards --dry-run: hours, bytes and rows of an encoding, from measured batches."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path

from ..shared.console import say, table
from ..shared.images import ImageRecord
from ..shared.sources import KeyLedger, SourceShard
from ..shared.token_store import ShardRows, concatenate_rows, empty_rows, write_shard
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
    a_shard = _bytes_on_disk(empty_rows(encoder.policy.views, encoder.tower.grid))
    an_image = (_bytes_on_disk(rows) - a_shard) / max(len(rows), 1)
    surveyed = [shard for shard in shards if shard.name in ledger]
    total = sum(ledger.count(shard.name) for shard in surveyed)
    if len(surveyed) < len(shards):
        total = round(total + (len(shards) - len(surveyed)) * (total / len(surveyed) if surveyed else images))
        say("Remote shards were not opened; their images are counted as those of the others.")
    views = encoder.policy.views
    duration = timedelta(seconds=round(total / rate / processes))
    table(
        "Dry run: nothing was written",
        [
            ("measured", f"{len(timed)} batches, {rate:,.1f} images/s ({rate * views:,.1f} views/s) in one process"),
            ("to encode", f"{total:,} images x {views} views in {len(shards)} shards"),
            ("rows", f"{total:,} ({total * views:,} views)"),
            ("time", f"{duration} (h:mm:ss) with {processes} process(es) like this one"),
            ("bytes", f"{round(an_image * total + a_shard * len(shards)):,} ({an_image:,.0f} an image)"),
        ],
    )


def _bytes_on_disk(rows: ShardRows) -> int:
    with tempfile.TemporaryDirectory(prefix="mapet-") as folder:
        write_shard(Path(folder), "measured", rows, {})
        return sum(path.stat().st_size for path in Path(folder, "shards").iterdir())


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
