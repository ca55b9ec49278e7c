"""Features of groups of images: the same however far the device is ahead, and in order when something is wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.shared.errors import DataError
from mapet.shared.images.views import CENTER, ViewPolicy
from mapet.shared.sources.records import ImageRecord
from mapet.shared.sources.sources import open_source
from mapet.tokenize_stage.tokenizers.opening import load_tokenizer
from mapet.tokenize_stage.towers.features import ExtractedBatch, Request, extract_groups, group_requests
from torch import Tensor

VIEWS = ViewPolicy("random-resized", 2)


class Counting:
    """The chain's tower, which counts its forward passes and can give NaN in one of them."""

    def __init__(self, chain, bad: int | None = None):
        tower = load_tokenizer(chain.codebook, device="cpu").tower
        self.preprocess, self.grid, self.dim, self.device = tower.preprocess, tower.grid, tower.dim, tower.device
        self._tower, self._bad, self.passes = tower, bad, 0

    def features(self, pixels: Tensor) -> Tensor:
        found = self._tower.features(pixels)
        if self.passes == self._bad:
            found = torch.where(torch.arange(len(found))[:, None, None] == 1, torch.nan, found)
        self.passes += 1
        return found


def records_of(chain) -> list[ImageRecord]:
    return [record for shard in open_source(chain.images) for record in shard.index()][:20]


def extracted(tower, records: Sequence[ImageRecord], **options) -> Iterator[ExtractedBatch]:
    groups = group_requests([Request(record) for record in records], options.get("policy", CENTER), 8)
    return extract_groups(
        tower, groups, **{"policy": CENTER, "batch_size": 8, "workers": 0, "unit_length": True} | options
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("ahead", [0, 1, 3, 99])
def test_the_same_batches_however_far_ahead(chain, ahead: int, workers: int):
    records = records_of(chain)
    expected = list(extracted(Counting(chain), records, policy=VIEWS, workers=0, ahead=0))
    found = list(extracted(Counting(chain), records, policy=VIEWS, workers=workers, ahead=ahead))
    assert [[record.key for record in batch.records] for batch in found] == [
        [record.key for record in records[start : start + 4]] for start in range(0, 20, 4)
    ]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("values", "crops", "flips", "sizes", "crc32"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_so_many_batches_are_computed_before_the_first_is_read(chain, ahead: int):
    tower = Counting(chain)
    found = extracted(tower, [*records_of(chain)] * 2, ahead=ahead)
    next(found)
    assert tower.passes == 1 + ahead
    next(found)
    assert tower.passes == 2 + ahead


@pytest.mark.parametrize("ahead", [0, 1, 99])
def test_the_batches_before_an_unreadable_image_come_first(chain, tmp_path: Path, ahead: int):
    records = records_of(chain)
    bad = tmp_path / "no-image.tar"
    bad.write_bytes(b"\0" * (records[17].offset + records[17].length))
    records[17] = replace(records[17], path=bad)
    found: list[ExtractedBatch] = []
    with pytest.raises(DataError, match=r"no-image\.tar"):
        found.extend(extracted(Counting(chain), records, ahead=ahead))
    assert [record.key for batch in found for record in batch.records] == [record.key for record in records[:16]]
    *_, last = extracted(Counting(chain), records, ahead=ahead, skip=True)
    assert [key for key, _ in last.skipped] == [records[17].key]
    assert (len(last.records), last.values.shape) == (3, (3, 1, 64, 32))


@pytest.mark.parametrize("ahead", [0, 1, 99])
@pytest.mark.parametrize("reduced", [False, True])
def test_features_that_are_not_finite_are_refused_with_their_image(chain, ahead: int, reduced: bool):
    """With a search for centroids as well, which must not see them."""
    records, seen = records_of(chain), []

    def reduce(features: Tensor) -> Tensor:
        seen.append(bool(torch.isfinite(features).all()))
        return features.argmax(1)

    found: list[ExtractedBatch] = []
    with pytest.raises(DataError, match="NaN or infinity") as error:
        found.extend(extracted(Counting(chain, bad=1), records, ahead=ahead, reduce=reduce if reduced else None))
    assert repr(records[9].key) in str(error.value)
    assert len(found) == 1
    assert all(seen)


def test_reduce_makes_one_value_of_each_patch(chain):
    records = records_of(chain)
    whole = list(extracted(Counting(chain), records, policy=VIEWS))
    largest = list(extracted(Counting(chain), records, policy=VIEWS, reduce=lambda features: features.argmax(1)))
    for ours, theirs in zip(largest, whole, strict=True):
        assert ours.values.shape == (len(theirs.records), 2, 64)
        assert np.array_equal(ours.values, theirs.values.argmax(-1))


def test_no_image_that_can_be_read_gives_an_empty_batch(chain, tmp_path: Path):
    record = replace(records_of(chain)[0], path=tmp_path / "none.tar")
    (batch,) = extracted(Counting(chain), [record], skip=True, reduce=lambda features: features.argmax(1))
    assert (batch.records, batch.values.shape, len(batch.skipped)) == ([], (0, 1, 64), 1)
