"""Encodes stored images again and compares the tokens: verify --reencode."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.images.views import ViewPolicy
from ...shared.randomness import generator
from ...shared.runtime.console import progress, say
from ...shared.runtime.devices import choose_workers
from ...shared.sources.sources import SourceShard
from ...shared.tokens.rows import ShardRows, take_rows
from ...shared.tokens.store import TokenStore
from ..inspection.faults import Fault, find_fault
from ..inspection.warnings import fault_warning
from ..tokenizers.base import Tokenizer
from ..towers.features import Request, group_requests
from .shards import Encoder, as_rows

_MOST_ROUNDED = 0.02
"""The largest share of tokens that rounding may change."""


@dataclass
class Reencoding:
    """The comparison: how many images and tokens were compared, how many tokens differ, and what is wrong."""

    images: int = 0
    tokens: int = 0
    differ: int = 0
    rounded: int = 0
    """Tokens that differ by rounding alone: two codes match equally well."""
    problems: list[str] = field(default_factory=list)
    wrong: list[tuple[NDArray[Any], ...]] = field(default_factory=list)
    """For each image with wrong tokens: its tokens computed again, the stored tokens of itself, of the image before
    and of the image after it in the shard (V, H, W), and its flips (V,)."""

    def summary(self) -> str:
        """One line for the table."""
        rounded = f", {self.rounded:,} of them between codes that match equally well" if self.rounded else ""
        return f"{self.images:,} images: {self.tokens:,} tokens compared, {self.differ:,} differ{rounded}"


def encode_again(
    store: TokenStore,
    tokenizer: Tokenizer,
    sources: Mapping[str, SourceShard],
    count: int,
    seed: int,
    batch_size: int,
    workers: int | None,
) -> Reencoding:
    """Encodes `count` images, drawn by `seed` from the whole store, again and compares all their views.

    `sources` are the shards of the source by name; images of other shards are left out.
    """
    policy = ViewPolicy.from_json(store.view)
    encoder = Encoder(tokenizer, policy, False, batch_size, choose_workers(workers, tokenizer.device.type))
    result = Reencoding()
    with progress("encoding again", min(count, len(store))) as advance:
        for name, indices in _drawn(store, count, seed):
            if name not in sources:
                continue  # reported already
            rows = store.read_rows(name)
            for again, features, index in _encoded(encoder, rows, indices, sources[name]):
                _compare(result, f"{name}: image {rows.keys[index]!r}", tokenizer, again, features, rows, index)
                advance(1)
    result.problems[:0] = _explained(result)
    if result.rounded > max(2, _MOST_ROUNDED * result.tokens):
        result.problems.append(f"too many tokens differ when they are computed again ({result.summary()})")
    return result


def _explained(result: Reencoding) -> list[str]:
    """One sentence about the known fault that explains all wrong tokens, if there is one."""
    if not result.wrong:
        return []
    right, stored, before, after, flips = (np.array(part) for part in zip(*result.wrong, strict=True))
    fault: Fault | None = find_fault(right, stored, before, after, flips)
    if fault is None:
        return []
    warning = fault_warning(fault, len(result.wrong), "the tower and the codebook")
    return [
        f"{warning['what']} ({warning['why']}); give encode-shards again with another --out, or fix the program that "
        "wrote them"
    ]


def _drawn(store: TokenStore, count: int, seed: int) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """(shard, rows) of the images to encode again: uniform over the store, without replacement."""
    picked = generator(seed, "reencode").choice(len(store), min(count, len(store)), replace=False)
    start = 0
    for name, entry in store.entries.items():
        indices = np.sort(picked[(picked >= start) & (picked < start + entry["images"])]) - start
        start += entry["images"]
        if len(indices):
            yield name, indices


def _encoded(
    encoder: Encoder, rows: ShardRows, indices: NDArray[np.int64], source: SourceShard
) -> Iterator[tuple[ShardRows, NDArray[np.float32], int]]:
    """Yields for each image (its row computed again, its features (V, patches, dim), its index in `rows`)."""
    with source.staged() as here:
        records = {record.key: record for record in here.index([])}
        remaining = iter(indices.tolist())
        requests = [Request(records[rows.keys[index]]) for index in indices]
        groups = group_requests(requests, encoder.policy, encoder.batch_size)
        for batch, tokens in encoder.batches_with_features(groups):
            again = as_rows(here, batch, tokens)
            for at, features in enumerate(batch.values):
                yield take_rows(again, [at]), features, next(remaining)


def _compare(
    result: Reencoding,
    name: str,
    tokenizer: Tokenizer,
    again: ShardRows,
    features: NDArray[np.float32],
    rows: ShardRows,
    index: int,
) -> None:
    stored = take_rows(rows, [index])
    for column in ("sizes", "crops", "flips"):
        if not np.array_equal(getattr(stored, column), getattr(again, column)):
            result.problems.append(f"{name} has other {column} when it is encoded again")
    different = (stored.tokens != again.tokens).reshape(-1)
    rounded = tokenizer.nearly_equal(
        features.reshape(-1, features.shape[-1])[different],
        stored.tokens.reshape(-1)[different],
        again.tokens.reshape(-1)[different],
    )
    result.images += 1
    result.tokens += len(different)
    result.differ += int(different.sum())
    result.rounded += int(rounded.sum())
    if not rounded.all():
        wrong = int((~rounded).sum())
        result.problems.append(f"{name} has {wrong} of {len(different)} other tokens when it is encoded again")
        neighbours = (rows.tokens[(index + step) % len(rows)] for step in (0, -1, 1))
        result.wrong.append((again.tokens[0], *neighbours, rows.flips[index]))
    elif len(rounded):
        say(f"{name}: {len(rounded)} of {len(different)} tokens differ, by rounding alone.")
