"""The classifiers on frozen features measure what features carry: everything, or nothing."""

import pytest
import torch
from mapet.train_stage.probing.knn import knn_accuracy
from mapet.train_stage.probing.linear_probe import linear_probe


def clusters(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (count, 8) in five clusters, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, 8, generator=generator), labels


def test_separable_features_are_told_apart_and_noise_is_not():
    near, noise = clusters(400, 0.1, 1), clusters(400, 100.0, 3)
    assert linear_probe(*near, *clusters(400, 0.1, 2)).top1 > 0.99
    assert knn_accuracy(*near, *clusters(400, 0.1, 2)) > 0.99
    assert linear_probe(*noise, *clusters(400, 100.0, 4)).top1 < 0.35
    assert knn_accuracy(*noise, *clusters(400, 100.0, 4)) < 0.35


def test_the_linear_probe_does_as_well_as_the_best_possible_classifier():
    train, test = clusters(2000, 0.7, 1), clusters(2000, 0.7, 2)
    centres = torch.stack([train[0][train[1] == label].mean(0) for label in range(5)])
    best = (torch.cdist(test[0], centres).argmin(1) == test[1]).float().mean().item()
    assert linear_probe(*train, *test).top1 == pytest.approx(best, abs=0.02)


def test_the_nearest_neighbour_alone_decides_for_k_of_one():
    (train, labels), (test, test_labels) = clusters(300, 0.7, 1), clusters(1500, 0.7, 2)
    centred = (train - train.mean(0), test - train.mean(0))
    units = [torch.nn.functional.normalize(features, dim=1) for features in centred]
    expected = (labels[(units[1] @ units[0].T).argmax(1)] == test_labels).float().mean().item()
    assert knn_accuracy(train, labels, test, test_labels, k=1) == pytest.approx(expected)
    assert knn_accuracy(train, labels, train, labels, k=1) == 1
