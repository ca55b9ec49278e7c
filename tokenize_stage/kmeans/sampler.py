"""Reads a source's keys and extracts the features of its sampled patches, with all processes of the world."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...shared.errors import DataError
from ...shared.images.views import CENTER
from ...shared.runtime.console import Advance, progress
from ...shared.runtime.distributed import World
from ...shared.sources.keys import KeyLedger, Skipped
from ...shared.sources.passed import PassedOver
from ...shared.sources.records import ImageRecord
from ...shared.sources.sources import SourceShard, say_passed_over
from ..towers.features import extract
from ..towers.tower import Tower
from .feature_cache import FeatureCache, Rows
from .patch_sample import PatchSample


@dataclass(frozen=True)
class SourceKeys:
    """The keys of all shards of a source, read from their headers."""

    keys: dict[str, list[str]]
    """By shard, in the source's order."""
    skipped: Skipped
    """(key, reason) of unusable entries."""

    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]

    def shards_sha256(self) -> str:
        """Digest of the assignment of keys to shards; independent of the order of shards."""
        digest = hashlib.sha256()
        for name in sorted(self.keys):
            digest.update("\n".join([name, *self.keys[name], ""]).encode())
        return digest.hexdigest()


def read_keys(shards: Sequence[SourceShard], world: World, skip: bool) -> SourceKeys:
    """Reads the headers of all shards, each process those of its share.

    Raises DataError for unusable entries, unless `skip` is set, and for a key that is in two shards.
    """
    share: dict[str, tuple[list[str], Skipped]] = {}
    passed, everything = PassedOver(), PassedOver()
    with progress("reading headers", len(shards), "shards") as advance:
        for shard in world.shard(shards):
            skipped: Skipped = []
            with shard.staged() as here:
                records = here.index(skipped if skip else None, [], passed)
                share[shard.name] = ([record.key for record in records], skipped)
            advance(world.size)
    entries: dict[str, tuple[list[str], Skipped]] = {}
    for part, of_process in world.all_gather((share, passed)):
        entries |= part
        everything.merge(of_process)
    say_passed_over(everything)
    keys = {shard.name: entries[shard.name][0] for shard in shards}
    ledger = KeyLedger()
    for name, shard_keys in keys.items():
        ledger.add(name, shard_keys)
    world.on_rank_zero(lambda: ledger.refuse_doubles(lambda name: keys[name]))
    return SourceKeys(keys, [pair for shard in shards for pair in entries[shard.name][1]])


@dataclass(frozen=True)
class Sampler:
    """Extracts the features of a sample.

    With `skip`, unreadable images are listed; without it, the first one raises a DataError.
    """

    tower: Tower
    sample: PatchSample
    image_keys: Collection[str] | None
    """Keys of the images that the sample is drawn from; None is all."""
    unit_length: bool
    """Whether features are scaled to length one."""
    skip: bool
    batch_size: int
    workers: int

    def fill(self, cache: FeatureCache, shards: Sequence[SourceShard], keys: SourceKeys, world: World) -> None:
        """Writes the features that the cache lacks, each process those of its share of the source's shards."""
        names = [shard.name for shard in shards]
        missing = set(world.on_rank_zero(lambda: cache.unfinished(names)))
        share = world.shard([shard for shard in shards if shard.name in missing])
        with progress("extracting features", sum(len(keys.keys[shard.name]) for shard in share)) as advance:
            for shard in share:
                skipped: Skipped = []
                with shard.staged() as here:
                    records = here.index([] if self.skip else None, [])
                    cache.write_part(shard.name, self._rows(records, skipped, advance), skipped)
        world.wait()
        world.on_rank_zero(lambda: cache.assemble(names))

    def _rows(self, records: Sequence[ImageRecord], skipped: Skipped, advance: Advance) -> Iterator[Rows]:
        """Yields the sampled patches of these images, image by image. Images without any are not decoded."""
        sampled = {
            record.key: self.sample.of_image(record.key)
            for record in records
            if self.image_keys is None or record.key in self.image_keys
        }
        needed = [record for record in records if record.key in sampled and len(sampled[record.key][0])]
        advance(len(records) - len(needed))
        for batch in extract(
            self.tower,
            needed,
            CENTER,
            self.batch_size,
            self.workers,
            unit_length=self.unit_length,
            skip=self.skip,
        ):
            for record, features in zip(batch.records, batch.values[:, 0], strict=True):
                patches, draws = sampled[record.key]
                yield _half(features[patches], record), draws
            skipped += batch.skipped
            advance(len(batch.records) + len(batch.skipped))


def _half(features: NDArray[np.float32], record: ImageRecord) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = features.astype(np.float16)
    if not np.isfinite(half).all():
        largest = np.abs(features).max()
        raise DataError(
            f"{record.path}: features of image {record.key!r} do not fit into fp16 (up to {largest:.3g}, not beyond "
            "65504); use --metric cosine, --final-norm or another --layer."
        )
    return half
