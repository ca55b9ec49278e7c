"""Few labels are drawn by key and balanced; RankMe is the effective rank of the published formula."""

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from mapet.shared.errors import UsageError
from mapet.train_stage.evaluation.embed import FrozenFeatures
from mapet.train_stage.probing.linear_probe import linear_probe
from mapet.train_stage.probing.low_shot import LowShot, balanced_list
from mapet.train_stage.probing.rankme import RankMe, effective_rank

KEYS = [f"tar-{number % 3}/{number:04d}" for number in range(300)]
LABELS = [number % 5 for number in range(300)]


def test_a_list_has_as_many_images_of_each_class():
    drawn = balanced_list(KEYS, LABELS, 0.1, seed=0)
    assert len(drawn) == len(set(drawn)) == 30
    assert np.bincount([LABELS[index] for index in drawn]).tolist() == [6] * 5
    assert np.bincount([LABELS[index] for index in balanced_list(KEYS, LABELS, 0.001, seed=0)]).tolist() == [1] * 5
    rare = [0] * 298 + [1] * 2
    assert np.bincount([rare[index] for index in balanced_list(KEYS, rare, 0.1, seed=0)]).tolist() == [15, 2]


def test_a_list_depends_on_keys_and_seed_and_not_on_the_order_of_images():
    shuffled = list(range(300))
    random.Random(0).shuffle(shuffled)
    drawn = [KEYS[index] for index in balanced_list(KEYS, LABELS, 0.1, seed=0)]
    keys, labels = [KEYS[index] for index in shuffled], [LABELS[index] for index in shuffled]
    assert [keys[index] for index in balanced_list(keys, labels, 0.1, seed=0)] == drawn
    assert [KEYS[index] for index in balanced_list(KEYS, LABELS, 0.1, seed=1)] != drawn
    smaller = {KEYS[index] for index in balanced_list(KEYS, LABELS, 0.05, seed=0)}
    assert smaller < set(drawn)


def test_the_probe_with_few_labels_is_the_linear_probe_on_the_list(hidden_signal: FrozenFeatures):
    result = LowShot.parse("10%", seed=3).measure(hidden_signal)
    drawn = balanced_list(hidden_signal.train_keys, hidden_signal.train_labels.tolist(), 0.1, 3)
    keys = [hidden_signal.train_keys[index] for index in drawn]
    train, labels = hidden_signal.train[drawn], hidden_signal.train_labels[drawn]
    expected = linear_probe(train, labels, hidden_signal.val, hidden_signal.val_labels)
    assert result.name == "low-shot 10%"
    assert result.numbers == {"top1": expected.top1}
    assert (result.protocol["images"], result.protocol["images_per_class"]) == (100, [25, 25])
    assert result.protocol["list_sha256"] == hashlib.sha256("\n".join(keys).encode()).hexdigest()


def test_images_outside_the_list_are_not_read(hidden_signal: FrozenFeatures):
    drawn = balanced_list(hidden_signal.train_keys, hidden_signal.train_labels.tolist(), 0.1, 0)
    others = torch.full_like(hidden_signal.train, torch.nan)
    others[drawn] = hidden_signal.train[drawn]
    probe = LowShot(0.1)
    assert probe.measure(replace(hidden_signal, train=others)) == probe.measure(hidden_signal)


@pytest.mark.parametrize("text", ["10", "0%", "100%", "-1%", "x%", "", "nan%"])
def test_what_is_no_share_is_refused(text: str):
    with pytest.raises(UsageError, match="give one such as 1% or 10%"):
        LowShot.parse(text)


def test_the_effective_rank_is_that_of_the_formula():
    features = np.random.default_rng(0).normal(size=(200, 12)) * np.logspace(0, -3, 12)
    values = np.linalg.svd(features, compute_uv=False)
    shares = values / values.sum() + 1e-7
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(torch.tensor(features)) == pytest.approx(expected, rel=1e-6)
    assert effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-4)
    assert effective_rank(torch.ones(20, 5)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.zeros(20, 5)) == 0


def test_rankme_is_measured_on_training_images(hidden_signal: FrozenFeatures):
    result = RankMe().measure(hidden_signal)
    assert result.numbers["effective_rank"] == pytest.approx(effective_rank(hidden_signal.train))
    assert result.protocol["images"] == 1000
    assert RankMe(images=10).measure(hidden_signal).numbers["effective_rank"] <= 10
