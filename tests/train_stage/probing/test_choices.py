"""Choices of k, of a block and of weight decay are made on a tenth of the training images, never on the others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mapet.shared.errors import DataError, UsageError
from mapet.train_stage.evaluation.embed import Execution, FrozenFeatures
from mapet.train_stage.evaluation.held_out import split_held_out
from mapet.train_stage.evaluation.labelled import LabelledImages, labelled_images
from mapet.train_stage.probing import best_block
from mapet.train_stage.probing.best_block import choose_block, parse_block
from mapet.train_stage.probing.knn import KNearestNeighbours
from mapet.train_stage.probing.linear_probe import LinearProbe, held_out_accuracy
from mapet.train_stage.weights.read import load_weights
from torch.nn.functional import normalize

KS = (1, 5, 30)


def by_hand(features: FrozenFeatures, k: int, *, centred: bool) -> float:
    """Top-1 of k-NN, an image at a time, with softmax votes as DINOv2 writes them."""
    mean = features.train.mean(0) if centred else 0
    train, val = (normalize(half - mean, dim=1) for half in (features.train, features.val))
    correct = 0
    for query, truth in zip(val, features.val_labels.tolist(), strict=True):
        similarity, nearest = (train @ query).sort(descending=True)
        votes = torch.zeros(4)
        for weight, index in zip((similarity[:k] / 0.07).softmax(0), nearest[:k].tolist(), strict=True):
            votes[features.train_labels[index]] += weight
        correct += int(votes.argmax()) == truth
    return correct / len(val)


@pytest.mark.parametrize("centred", [True, False])
def test_each_number_of_neighbours_is_measured_as_if_alone(hidden_signal: FrozenFeatures, centred: bool):
    result = KNearestNeighbours(k=5, compared=KS, centred=centred).measure(hidden_signal)
    assert result.numbers["top1"] == result.numbers["top1_k5"]
    for k in KS:
        assert result.numbers[f"top1_k{k}"] == pytest.approx(by_hand(hidden_signal, k, centred=centred))
    assert result.numbers["top1_chosen_k"] == result.numbers[f"top1_k{result.protocol['compared']['chosen_k']}"]


def test_k_is_the_best_on_the_held_out_tenth(hidden_signal: FrozenFeatures):
    choose, fit = split_held_out(1000)
    inner = replace(
        hidden_signal,
        train=hidden_signal.train[fit],
        train_labels=hidden_signal.train_labels[fit],
        val=hidden_signal.train[choose],
        val_labels=hidden_signal.train_labels[choose],
    )
    compared = KNearestNeighbours(compared=KS).measure(hidden_signal).protocol["compared"]
    assert compared["held_out_top1"] == [pytest.approx(by_hand(inner, k, centred=True)) for k in KS]
    assert compared["chosen_k"] == KS[max(range(3), key=compared["held_out_top1"].__getitem__)]


def test_more_neighbours_than_images_are_left_out(hidden_signal: FrozenFeatures):
    few = replace(hidden_signal, train=hidden_signal.train[:50], train_labels=hidden_signal.train_labels[:50])
    assert KNearestNeighbours(compared=(10, 45, 46, 100)).measure(few).protocol["compared"]["ks"] == [10, 45]


@pytest.mark.parametrize("evaluation", [LinearProbe(), KNearestNeighbours(compared=KS)])
def test_no_choice_depends_on_validation_labels(hidden_signal: FrozenFeatures, evaluation):
    shuffled = hidden_signal.val_labels[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    plain, other = (
        evaluation.measure(features) for features in (hidden_signal, replace(hidden_signal, val_labels=shuffled))
    )
    assert plain.protocol == other.protocol
    assert plain.numbers != other.numbers


def test_a_tenth_is_held_out_and_a_single_image_is_refused():
    choose, fit = split_held_out(58)
    assert (len(choose), len(fit)) == (5, 53)
    assert sorted([*choose.tolist(), *fit.tolist()]) == list(range(58))
    assert [len(part) for part in split_held_out(2)] == [1, 1]
    with pytest.raises(DataError, match="it needs two or more"):
        split_held_out(1)


@pytest.fixture
def images(chain) -> LabelledImages:
    return labelled_images(chain.images)


def test_the_best_block_is_the_one_whose_features_hold_the_class(
    run: Path, images: LabelledImages, monkeypatch: pytest.MonkeyPatch
):
    plain, labels = best_block.embed_blocks, iter(images.labels)

    def planted(model, pixels: torch.Tensor, blocks) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Block 0 holds the class, and the last block noise."""
        (_, patches), (noise, _) = plain(model, pixels, blocks)
        truth = torch.tensor([int(next(labels)) for _ in pixels])
        first, noise = torch.nn.functional.one_hot(truth, noise.shape[1]).float(), torch.randn(noise.shape)
        return [(first, patches), (noise, patches)]

    monkeypatch.setattr(best_block, "embed_blocks", planted)
    choice = choose_block(load_weights(run), images, Execution())
    assert choice.block == 0
    assert choice.held_out_top1[0] == 1 > choice.held_out_top1[1]


def test_each_block_is_measured_by_the_linear_probe_on_the_held_out_tenth(run: Path, images: LabelledImages):
    weights = load_weights(run)
    choice = choose_block(weights, images, Execution(batch_size=40))
    pixels = best_block.normalised_views(images.records, weights.preprocess, 96, 0, "cpu")
    blocks = best_block.embed_blocks(weights.vit(), next(iter(pixels)), [0, 1])
    expected = [held_out_accuracy(pooled, images.labels) for pooled, _ in blocks]
    assert choice.held_out_top1 == pytest.approx(expected, abs=1 / 9)
    assert choice.block == max((0, 1), key=lambda block: (choice.held_out_top1[block], block))


def test_features_of_all_blocks_that_do_not_fit_into_memory_are_refused(
    run: Path, images: LabelledImages, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(best_block, "memory_budget", lambda memory: 1000)
    with pytest.raises(UsageError, match=r"--block best .* 2 blocks for 96 images in memory, 24\.6 kB"):
        choose_block(load_weights(run), images, Execution())


def test_blocks_are_counted_from_0_or_from_the_end():
    assert [parse_block(block, 12) for block in ("0", 7, "11", "-1", -12, "last")] == [0, 7, 11, 11, 0, 11]
    assert parse_block("best", 12) is None
    for block in ("12", -13, "first", ""):
        with pytest.raises(UsageError, match="give best, last or a number from 0 to 11"):
            parse_block(block, 12)
