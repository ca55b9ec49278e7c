"""Patches' labels, logistic regression and k-NN against loops and gradient descent."""

from collections import Counter

import numpy as np
import pytest
import torch
from mapet.train_stage.segmentation.patch_classifiers import FITS, STRENGTHS, PatchNeighbours, PatchRegression
from mapet.train_stage.segmentation.patches import PatchSet, held_out_keys, most_frequent
from mapet.train_stage.segmentation.pixel_classifier import PixelClassifier

CLASSES, PIXELS = 4, 6


def mode(values: list[int]) -> int:
    counts = Counter(value for value in values if value != -1)
    return min(counts, key=lambda value: (-counts[value], value)) if counts else -1


def patches(count: int, seed: int, noise: float = 1.0) -> PatchSet:
    """Patches whose features depend on their class, with blocks that hold other classes and ignored pixels, too."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, 5))
    main = random.integers(0, CLASSES, count)
    features = centres[main] * 2 + random.normal(size=(count, 5)) * noise
    blocks = np.repeat(main[:, None], PIXELS, 1)
    blocks = np.where(random.random(blocks.shape) < 0.3, random.integers(-1, CLASSES, blocks.shape), blocks)
    blocks[:, 0] = main  # at least one pixel is labelled
    tensor = torch.from_numpy(blocks.astype(np.int16))
    held_out = torch.from_numpy(np.arange(count) % 5 == 0)
    return PatchSet(
        torch.from_numpy(features).float(), tensor, most_frequent(tensor, CLASSES), held_out, CLASSES, {"drawn": "all"}
    )


def test_the_most_frequent_class_is_the_mode_without_ignored_pixels():
    values = np.random.default_rng(1).integers(-1, 3, (40, 3, 5)).astype(np.int16)
    values[0, 0], values[1, 1] = -1, [-1, -1, 2, -1, -1]
    expected = [[mode(block.tolist()) for block in row] for row in values]
    assert most_frequent(torch.from_numpy(values), 3).tolist() == expected
    assert (expected[0][0], expected[1][1]) == (-1, 2)


def naive_votes(
    train: PatchSet, features: torch.Tensor, k: int, metric: str, scaled_by: PatchSet | None = None
) -> list[list[int]]:
    """k-NN of standardised features by loops; each neighbour votes with its block."""
    scale = (scaled_by or train).features.double().numpy()
    bank, queries = (
        (part.double().numpy() - scale.mean(0)) / (scale.std(0, ddof=1) + 1e-6) for part in (train.features, features)
    )
    blocks, found = train.blocks.tolist(), []
    for query in queries:
        if metric == "l2":
            distance = [float(np.linalg.norm(query - one)) for one in bank]
        else:
            distance = [float(1 - query @ one / np.linalg.norm(query) / np.linalg.norm(one)) for one in bank]
        nearest = sorted(range(len(bank)), key=distance.__getitem__)[:k]
        votes = [mode([blocks[index][pixel] for index in nearest]) for pixel in range(PIXELS)]
        found.append([mode(blocks[nearest[0]]) if vote == -1 else vote for vote in votes])
    return found


@pytest.mark.parametrize("noise", [0.5, 6.0])
def test_neighbours_vote_with_their_blocks(noise: float):
    train, val = patches(60, 2, noise), patches(15, 3, noise)
    classifier = PatchNeighbours(train, lambda count: None)
    k, metric = classifier.protocol["k"], classifier.protocol["metric"]
    assert classifier.predict(val.features).tolist() == naive_votes(train, val.features, k, metric)


def test_k_and_metric_are_those_that_do_best_on_the_held_out_patches():
    train = patches(60, 4, 4.0)
    chosen = PatchNeighbours(train, lambda count: None).protocol
    rest, held_out = train.only(~train.held_out), train.only(train.held_out)
    scores = {}
    for metric in ("cosine", "l2"):
        for k in (1, 3, 10, 30):
            votes = naive_votes(rest, held_out.features, k, metric, scaled_by=train)
            scores[k, metric] = naive_iou(held_out.blocks.numpy(), np.array(votes))
    assert len(set(scores.values())) > 2
    assert scores[chosen["k"], chosen["metric"]] == max(scores.values())


def naive_iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    known = truth != -1
    values = []
    for index in np.unique(truth[known]):
        both = (truth == index) & (predicted == index)
        either = ((truth == index) | (predicted == index)) & known
        values.append(both.sum() / either.sum())
    return float(np.mean(values))


def test_where_every_neighbour_is_ignored_the_nearest_patch_decides():
    train = patches(12, 5)
    train.blocks[:, 3] = -1
    classifier = PatchNeighbours(train, lambda count: None)
    expected = naive_votes(train, train.features, classifier.protocol["k"], classifier.protocol["metric"])
    assert classifier.predict(train.features).tolist() == expected


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_logistic_regression_minimises_what_it_says(monkeypatch: pytest.MonkeyPatch, strength: float):
    monkeypatch.setattr("mapet.train_stage.segmentation.patch_classifiers.STRENGTHS", (strength,))
    train, val = patches(80, 6), patches(40, 7)
    mean, scale = train.features.double().mean(0), train.features.double().std(0) + 1e-6
    features, labels = ((train.features - mean) / scale).numpy(), train.labels.numpy()

    # Gradient descent on C * (sum of the cross-entropies) + |weight|^2 / 2; the intercept is not regularised.
    weight, bias, truth = np.zeros((5, CLASSES)), np.zeros(CLASSES), np.eye(CLASSES)[labels]
    for _ in range(4000):
        exponents = np.exp(features @ weight + bias)
        residuals = strength * (exponents / exponents.sum(1, keepdims=True) - truth)
        weight -= (features.T @ residuals + weight) / (1 + 100 * strength)
        bias -= residuals.sum(0) / (100 * strength)
    logits = ((val.features - mean) / scale).numpy() @ weight + bias
    predicted = PatchRegression(train, lambda count: None).predict(val.features)
    assert predicted.tolist() == np.repeat(logits.argmax(1)[:, None], PIXELS, 1).tolist()


def test_the_strength_is_chosen_on_the_held_out_patches():
    train = patches(80, 9, 0.2)
    assert PatchRegression(train, lambda count: None).protocol["strength"] > STRENGTHS[1]  # which predict one class


def test_progress_counts_every_fit():
    calls: list[int] = []
    train = patches(40, 8)
    classifiers: list[PixelClassifier] = [PatchRegression(train, calls.append), PatchNeighbours(train, calls.append)]
    assert sum(calls) == FITS
    assert all(classifier.protocol["drawn"] == "all" for classifier in classifiers)


def test_a_tenth_of_the_images_is_held_out_whatever_their_order():
    keys = [f"image-{number}" for number in range(40)]
    assert len(held_out_keys(keys)) == 4
    assert held_out_keys(keys) == held_out_keys(keys[::-1])
    assert len(held_out_keys(keys[:2])) == 1
