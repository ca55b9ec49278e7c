"""The order of images: each one at most once an epoch, from any step on, and known from the seed alone."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapet.shared.errors import UsageError
from mapet.train_stage.data.batch_order import global_batches, shard_groups
from mapet.train_stage.data.dataset import TokenisedImages
from mapet.train_stage.settings import DataSettings, Settings, TrainSettings


def data_of(shards: list[int], seed: int = 0) -> TokenisedImages:
    """Images in shards of these sizes, whose keys stand in another order than their rows."""
    rows = np.random.default_rng(seed).permutation(sum(shards))
    columns = {field.name: None for field in fields(TokenisedImages)}
    return TokenisedImages(**columns | {"rows": rows, "images": np.argsort(rows), "shard_ends": np.cumsum(shards)})


def settings_of(batch: int, epochs: int, shuffle: str = "full", group: int = 2, seed: int = 0) -> Settings:
    data = DataSettings(shuffle=shuffle, shuffle_shards=group)
    return Settings(data=data, train=TrainSettings(epochs=epochs, batch_size=batch, seed=seed))


CASES = {
    "shards": st.lists(st.integers(1, 9), min_size=1, max_size=8),
    "batch": st.integers(1, 12),
    "epochs": st.integers(1, 3),
    "group": st.integers(1, 4),
    "shuffle": st.sampled_from(["full", "shards"]),
    "seed": st.integers(0, 3),
}


@given(**CASES, data=st.data())
def test_every_image_once_an_epoch_and_the_same_from_any_step_on(shards, batch, epochs, group, shuffle, seed, data):
    images, settings = data_of(shards), settings_of(batch, epochs, shuffle, group, seed)
    batches = list(global_batches(images, settings, 0))
    steps = len(images) // batch
    assert [epoch for epoch, _ in batches] == [epoch for epoch in range(epochs) for _ in range(steps)]
    for epoch in range(epochs):
        seen = [index for where, some in batches for index in some if where == epoch]
        assert all(len(some) == batch for _, some in batches)
        assert len(set(seen)) == len(seen) == steps * batch
        assert set(seen) <= set(range(len(images)))
    start = data.draw(st.integers(0, len(batches)))
    again = list(global_batches(images, settings, start))
    assert len(again) == len(batches) - start
    assert all(a == b and (x == y).all() for (a, x), (b, y) in zip(again, batches[start:], strict=True))


@given(**CASES)
def test_shards_come_a_few_at_a_time_and_their_images_mixed(shards, batch, epochs, group, shuffle, seed):
    """Whatever the batch size: at no time are images of more than one group of shards, and a batch's rest, needed."""
    images, settings = data_of(shards), settings_of(batch, epochs, "shards", group, seed)
    shard_of = np.searchsorted(images.shard_ends, images.rows, side="right")
    for epoch in range(epochs):
        groups = shard_groups(images, settings, epoch)
        assert sorted(np.concatenate(groups)) == list(range(len(shards)))
        assert {len(some) for some in groups[:-1]} <= {group}
        rank = {shard: number for number, some in enumerate(groups) for shard in some}
        seen = [index for where, some in global_batches(images, settings, 0) if where == epoch for index in some]
        ranks = [rank[shard_of[index]] for index in seen]
        assert ranks == sorted(ranks)


@pytest.mark.parametrize("shuffle", ["full", "shards"])
def test_another_epoch_or_seed_is_another_order(shuffle: str):
    images = data_of([20] * 6)
    orders = [
        tuple(np.concatenate([some for epoch, some in global_batches(images, settings, 0) if epoch == at]))
        for settings in (settings_of(8, 2, shuffle), settings_of(8, 2, shuffle, seed=1))
        for at in range(2)
    ]
    assert len(set(orders)) == 4
    assert [list(some) for some in shard_groups(images, settings_of(8, 2), 0)] != [[0, 1], [2, 3], [4, 5]]


def test_images_of_a_group_are_mixed_evenly():
    images = data_of([50] * 8)
    shard_of = np.searchsorted(images.shard_ends, images.rows, side="right")
    first = [some for _, some in global_batches(images, settings_of(50, 1, "shards", 4), 0)][:4]
    assert all((np.bincount(shard_of[some]) > 4).sum() == 4 for some in first)


def test_a_full_order_does_not_depend_on_how_images_lie_in_shards():
    for settings in (settings_of(7, 2), settings_of(7, 2, group=1)):
        orders = [list(global_batches(images, settings, 3)) for images in (data_of([5, 20, 9]), data_of([34], seed=3))]
        assert all((a[1] == b[1]).all() for a, b in zip(*orders, strict=True))


def test_settings_of_the_order_are_checked():
    with pytest.raises(UsageError, match=r"data\.shuffle 'some' is unknown; choose from full, shards"):
        DataSettings(shuffle="some")
    with pytest.raises(UsageError, match=r"data\.shuffle_shards 0 must be at least 1"):
        DataSettings(shuffle_shards=0)
