"""Mean IoU and pixel accuracy against loops over the pixels."""

import numpy as np
import pytest
import torch
from mapet.train_stage.segmentation.scores import Confusion


def by_loops(truth: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[float, float, list[float | None]]:
    """Mean IoU over the classes in the truth, pixel accuracy, and IoU by class; -1 is ignored."""
    iou: list[float | None] = []
    for index in range(classes):
        both = either = occurs = 0
        for true, found in zip(truth.ravel(), predicted.ravel(), strict=True):
            if true == -1:
                continue
            both += true == index and found == index
            either += true == index or found == index
            occurs += true == index
        iou.append(both / either if occurs else None)
    pairs = [(true, found) for true, found in zip(truth.ravel(), predicted.ravel(), strict=True) if true != -1]
    known = [value for value in iou if value is not None]
    return sum(known) / len(known), sum(true == found for true, found in pairs) / len(pairs), iou


def test_scores_are_those_of_loops():
    random = np.random.default_rng(0)
    truth = random.choice([-1, 0, 1, 2, 4], (3, 7, 9)).astype(np.int16)  # class 3 does not occur
    predicted = np.where(random.random(truth.shape) < 0.5, np.maximum(truth, 0), random.integers(0, 5, truth.shape))
    confusion = Confusion(5)
    for one, other in zip(truth, predicted, strict=True):
        confusion.add(torch.from_numpy(one), torch.from_numpy(other))
    mean_iou, accuracy, iou = by_loops(truth, predicted, 5)
    scores = confusion.scores()
    assert (predicted[truth != -1] == 3).any()
    assert scores.iou[3] is None
    assert scores.iou == pytest.approx(iou)
    assert (scores.mean_iou, scores.pixel_accuracy) == pytest.approx((mean_iou, accuracy))


def test_a_worked_example():
    confusion = Confusion(3)
    confusion.add(torch.tensor([0, 0, 0, 1, 1, -1]), torch.tensor([0, 0, 1, 1, 2, 2]))
    # Class 0: 2 of 3; class 1: 1 of 3 (one missed, one wrong); class 2 does not occur in the truth.
    assert confusion.scores().iou == pytest.approx([2 / 3, 1 / 3, None])
    assert confusion.scores().mean_iou == pytest.approx(1 / 2)
    assert confusion.scores().pixel_accuracy == pytest.approx(3 / 5)
