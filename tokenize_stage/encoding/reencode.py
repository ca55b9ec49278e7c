"""verify --reencode: are the stored tokens those that the tower and the codebook give?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...shared.images.sources import SourceShard
from ...shared.images.views import ViewPolicy
from ...shared.randomness import generator
from ...shared.runtime.console import progress, say
from ...shared.runtime.devices import choose_device, choose_workers
from ...shared.tokens.codebook import Codebook
from ...shared.tokens.rows import ShardRows, take_rows
from ...shared.tokens.store import TokenStore
from ..inspection.faults import fault_of
from ..inspection.warnings import suspect_fault
from ..tokenizers.kclip import open_same_tower
from ..towers.features import Request, group_requests
from .shards import Encoder, as_rows

# Another device or batch size rounds differently: where two centroids are as near as that, either token is right.
_ROUNDING = {"float32": 1e-5, "bfloat16": 1e-2}
_MOST_ROUNDED = 0.02


@dataclass
class Reencoding:
    """What was compared: images, tokens, how many tokens differ, how many of them by rounding alone, and problems."""

    images: int = 0
    tokens: int = 0
    differ: int = 0
    rounded: int = 0
    problems: list[str] = field(default_factory=list)
    wrong: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    """Of each image whose tokens differ: those computed again, those stored with it and with the images before and
    after it in the shard (V, H, W), its flips (V,)."""

    def summary(self) -> str:
        """One line for the table."""
        rounded = f", {self.rounded:,} of them between centroids that are equally near" if self.rounded else ""
        return f"{self.images:,} images: {self.tokens:,} tokens compared, {self.differ:,} differ{rounded}"


def encode_again(
    store: TokenStore,
    book: Codebook,
    sources: Mapping[str, SourceShard],
    count: int,
    seed: int,
    tower: str | None,
    batch_size: int,
    workers: int | None,
    device: str,
) -> Reencoding:
    """Computes `count` images, drawn by `seed` from the whole store, again and compares all their views."""
    opened = open_same_tower(book, tower, choose_device(device))
    policy = ViewPolicy.from_json(store.view)
    encoder = Encoder(book, opened, policy, False, batch_size, choose_workers(workers, opened.device.type))
    result = Reencoding()
    with progress("encoding again", min(count, len(store))) as advance:
        for name, places in _drawn(store, count, seed):
            if name not in sources:
                continue  # told already
            rows = store.read_rows(name)
            for again, features, place in _encoded(encoder, rows, places, sources[name]):
                _compare(result, f"{name}: image {rows.keys[place]!r}", book, again, features, rows, place)
                advance(1)
    result.problems[:0] = _explained(result)
    if result.rounded > max(2, _MOST_ROUNDED * result.tokens):
        result.problems.append(f"too many tokens differ when they are computed again ({result.summary()})")
    return result


def _explained(result: Reencoding) -> list[str]:
    """The one fault that explains the tokens that differ, if there is one, to be told first."""
    if not result.wrong:
        return []
    fault = fault_of(*(np.array(part) for part in zip(*result.wrong, strict=True)))
    if fault is None:
        return []
    found = suspect_fault(*fault, len(result.wrong), "the tower and the codebook")
    return [f"{found['what']} ({found['why']}); give encode-shards again with another --out, or mend what wrote them"]


def _drawn(store: TokenStore, count: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(shard, rows) of the images to compute again: uniform over the store, without replacement."""
    picked = generator(seed, "reencode").choice(len(store), min(count, len(store)), replace=False)
    start = 0
    for name, entry in store.entries.items():
        places = np.sort(picked[(picked >= start) & (picked < start + entry["images"])]) - start
        start += entry["images"]
        if len(places):
            yield name, places


def _encoded(
    encoder: Encoder, rows: ShardRows, places: np.ndarray, source: SourceShard
) -> Iterator[tuple[ShardRows, np.ndarray, int]]:
    """Yields, for each image, (its row computed again, features (V, patches, dim), its place in `rows`)."""
    with source.staged() as here:
        found = {record.key: record for record in here.index([])}
        done = iter(places.tolist())
        requests = [Request(found[rows.keys[place]]) for place in places]
        groups = group_requests(requests, encoder.policy, encoder.batch_size)
        for batch, tokens in encoder.batches(groups):
            again = as_rows(here, batch, tokens)
            for at, features in enumerate(batch.features):
                yield take_rows(again, [at]), features, next(done)


def _compare(
    result: Reencoding, name: str, book: Codebook, again: ShardRows, features: np.ndarray, rows: ShardRows, place: int
) -> None:
    before = take_rows(rows, [place])
    for what in ("sizes", "crops", "flips"):
        if not np.array_equal(getattr(before, what), getattr(again, what)):
            result.problems.append(f"{name} has other {what} when it is encoded again")
    other = (before.tokens != again.tokens).reshape(-1)
    rounded = _equally_near(
        book,
        features.reshape(-1, features.shape[-1])[other],
        *(row.tokens.reshape(-1)[other] for row in (before, again)),
    )
    result.images += 1
    result.tokens += len(other)
    result.differ += int(other.sum())
    result.rounded += int(rounded.sum())
    if not rounded.all():
        result.problems.append(f"{name} has {(~rounded).sum()} of {len(other)} other tokens when it is encoded again")
        stored = (rows.tokens[(place + step) % len(rows)] for step in (0, -1, 1))
        result.wrong.append((again.tokens[0], *stored, rows.flips[place]))
    elif len(rounded):
        say(f"{name}: {len(rounded)} of {len(other)} tokens differ, by rounding alone.")


def _equally_near(book: Codebook, features: np.ndarray, tokens: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    """Whether centroids `tokens` are as near to `features` (n, dim) as the nearest ones are, but for rounding."""
    points, centroids = features.astype(np.float64), book.centroids.astype(np.float64)
    far, near = (((points - centroids[codes]) ** 2).sum(-1) for codes in (tokens, nearest))
    scale = (points**2).sum(-1) + (centroids[nearest] ** 2).sum(-1)
    return far - near <= _ROUNDING[book.description["precision"]] * scale
