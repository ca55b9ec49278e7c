"""A source's keys, and the features of its sampled patches, by all processes of the world."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...shared.errors import DataError
from ...shared.images.keys import Skipped
from ...shared.images.records import ImageRecord
from ...shared.images.sources import KeyLedger, SourceShard
from ...shared.images.views import CENTER
from ...shared.runtime.console import Advance, progress
from ...shared.runtime.distributed import World
from ..towers.features import extract
from ..towers.tower import Tower
from .feature_cache import FeatureCache, Rows
from .patch_sample import PatchSample


@dataclass(frozen=True)
class Survey:
    """The keys of each shard, from its headers, and what cannot be used: (key, reason)."""

    keys: dict[str, list[str]]
    skipped: Skipped

    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]

    def shards_sha256(self) -> str:
        """Digest of which keys stand in which shard, whatever the order of shards."""
        whole = hashlib.sha256()
        for name in sorted(self.keys):
            whole.update("\n".join([name, *self.keys[name], ""]).encode())
        return whole.hexdigest()


def survey(shards: Sequence[SourceShard], world: World, skip: bool) -> Survey:
    """Reads the headers of all shards, each process those of its share.

    Raises DataError for what cannot be used, unless `skip`, and for a key that stands in two shards.
    """
    own: dict[str, tuple[list[str], Skipped]] = {}
    with progress("reading headers", len(shards), "shards") as advance:
        for shard in world.shard(shards):
            skipped: Skipped = []
            with shard.staged() as here:
                own[shard.name] = ([record.key for record in here.index(skipped if skip else None)], skipped)
            advance(world.size)
    found = {name: entry for part in world.all_gather(own) for name, entry in part.items()}
    keys = {shard.name: found[shard.name][0] for shard in shards}
    ledger = KeyLedger()
    for name, some in keys.items():
        ledger.add(name, some)
    world.on_rank_zero(lambda: ledger.refuse_doubles(lambda name: keys[name]))
    return Survey(keys, [pair for shard in shards for pair in found[shard.name][1]])


@dataclass(frozen=True)
class Sampler:
    """Extracts the features of `sample` from the images `chosen` (None: all).

    With `skip`, images that cannot be read are listed; without, the first of them raises a DataError.
    """

    tower: Tower
    sample: PatchSample
    chosen: Collection[str] | None
    metric: str
    skip: bool
    batch_size: int
    workers: int

    def fill(self, cache: FeatureCache, shards: Sequence[SourceShard], found: Survey, world: World) -> None:
        """Writes what the cache lacks, each process its share of the source's shards."""
        names = [shard.name for shard in shards]
        left = set(world.on_rank_zero(lambda: cache.unfinished(names)))
        todo = world.shard([shard for shard in shards if shard.name in left])
        with progress("extracting features", sum(len(found.keys[shard.name]) for shard in todo)) as advance:
            for shard in todo:
                skipped: Skipped = []
                with shard.staged() as here:
                    records = here.index([] if self.skip else None)
                    cache.write_part(shard.name, self._rows(records, skipped, advance), skipped)
        world.wait()
        world.on_rank_zero(lambda: cache.assemble(names))

    def _rows(self, records: Sequence[ImageRecord], skipped: Skipped, advance: Advance) -> Iterator[Rows]:
        """The sampled patches of these images, image by image. Images without any are not decoded."""
        picked = {
            record.key: self.sample.of_image(record.key)
            for record in records
            if self.chosen is None or record.key in self.chosen
        }
        needed = [record for record in records if record.key in picked and len(picked[record.key][0])]
        advance(len(records) - len(needed))
        for batch in extract(self.tower, needed, CENTER, self.batch_size, self.workers, self.metric, skip=self.skip):
            for record, features in zip(batch.records, batch.features[:, 0], strict=True):
                patches, draws = picked[record.key]
                yield _half(features[patches], record), draws
            skipped += batch.skipped
            advance(len(batch.records) + len(batch.skipped))


def _half(features: np.ndarray, record: ImageRecord) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = features.astype(np.float16)
    if not np.isfinite(half).all():
        largest = np.abs(features).max()
        raise DataError(
            f"{record.path}: features of image {record.key!r} do not fit into fp16 (up to {largest:.3g}, not beyond "
            "65504); use --metric cosine, --final-norm or another --layer."
        )
    return half
