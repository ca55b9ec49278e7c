"""Measures of logits equal naive ones, image by image, and numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.train_stage.scoring import measures
from mapet.train_stage.scoring.measures import BINS, Scores


def naive(logits: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The definitions, one image at a time, in float64."""
    count, outputs = logits.shape
    top1 = top5 = nll = brier = 0.0
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, target in zip(logits.astype(np.float64), targets, strict=True):
        exponentials = [math.exp(value - max(row)) for value in row]
        probabilities = [value / sum(exponentials) for value in exponentials]
        ranking = sorted(range(outputs), key=lambda output: -row[output])
        top1 += ranking[0] == target
        top5 += target in ranking[:5]
        nll -= math.log(probabilities[target])
        brier += sum((p - (output == target)) ** 2 for output, p in enumerate(probabilities))
        confidence = max(probabilities)
        bins.setdefault(min(int(confidence * BINS), BINS - 1), []).append((confidence, ranking[0] == target))
    ece = sum(abs(sum(c for c, _ in inside) - sum(right for _, right in inside)) for inside in bins.values()) / count
    return {"top1": top1 / count, "top5": top5 / count, "ece": ece, "nll": nll / count, "brier": brier / count}


def random_scores(seed: int, count: int, outputs: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(seed)
    return scale * drawn.standard_normal((count, outputs), dtype=np.float32), drawn.integers(0, outputs, count)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.integers(2, 12), st.sampled_from([0.1, 1.0, 5.0]))
def test_numbers_equal_naive_ones(seed: int, count: int, outputs: int, scale: float):
    logits, targets = random_scores(seed, count, outputs, scale)
    scores = Scores(torch.from_numpy(logits), torch.from_numpy(targets), list(map(str, range(outputs))))
    assert scores.numbers() == pytest.approx(naive(logits, targets), rel=1e-9, abs=1e-12)


def test_numbers_do_not_depend_on_how_many_rows_are_in_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measures, "_ROWS", 7)
    logits, targets = random_scores(3, 40, 6, 2.0)
    scores = Scores(torch.from_numpy(logits), torch.from_numpy(targets), list("abcdef"))
    assert scores.numbers() == pytest.approx(naive(logits, targets), rel=1e-9)


def test_worked_by_hand():
    """Two outputs with probabilities (0.8, 0.2), (0.8, 0.2), (0.5, 0.5) + a hair, of classes 0, 1, 1."""
    logits = torch.tensor([[math.log(4), 0.0], [math.log(4), 0.0], [0.0, 1e-6]], dtype=torch.float64)
    scores = Scores(logits, torch.tensor([0, 1, 1]), ["cat", "dog"])
    numbers = scores.numbers()
    assert numbers["top1"] == pytest.approx(2 / 3)
    assert numbers["top5"] == 1
    assert numbers["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.2) + math.log(0.5)) / 3, rel=1e-6)
    assert numbers["brier"] == pytest.approx((0.08 + 1.28 + 0.5) / 3, rel=1e-5)
    # Bin 12 (0.8 to 0.867): confidence 0.8, accuracy 0.5, two images; bin 7 (0.467 to 0.533): 0.5 and 1, one image.
    assert numbers["ece"] == pytest.approx((2 * 0.3 + 0.5) / 3, rel=1e-5)
    assert {at: bin.images for at, bin in enumerate(scores.bins()) if bin.images} == {7: 1, 12: 2}
    assert [(one.name, one.images, one.top1, one.confused_with, one.confused_images) for one in scores.by_class()] == [
        ("cat", 1, 1.0, None, 0),
        ("dog", 2, 0.5, "cat", 1),
    ]
    assert scores.matrix().tolist() == [[1, 0], [1, 1]]


def test_classes_and_confusions_add_up():
    logits, targets = random_scores(5, 200, 7, 1.0)
    names = list("abcdefg")
    targets = targets % 6  # nothing of g
    scores = Scores(torch.from_numpy(logits), torch.from_numpy(targets), names)
    counted: dict[tuple[str, str], int] = {}
    for row, target in zip(logits, targets, strict=True):
        pair = (names[target], names[int(row.argmax())])
        counted[pair] = counted.get(pair, 0) + 1
    matrix = scores.matrix().tolist()
    assert {(names[a], names[b]): matrix[a][b] for a in range(7) for b in range(7) if matrix[a][b]} == counted
    confusions = scores.confusions()
    assert {(one.name, one.predicted): one.images for one in confusions} == {
        pair: images for pair, images in counted.items() if pair[0] != pair[1]
    }
    assert [one.images for one in confusions] == sorted((one.images for one in confusions), reverse=True)
    by_class = scores.by_class()
    assert [one.name for one in by_class] == names[:6]
    for one in by_class:
        of_class = {pair[1]: images for pair, images in counted.items() if pair[0] == one.name}
        assert one.images == sum(of_class.values())
        assert one.top1 == pytest.approx(of_class.pop(one.name, 0) / one.images)
        assert one.confused_images == max(of_class.values()) == of_class[one.confused_with]


def test_no_mistakes():
    scores = Scores(torch.eye(3), torch.arange(3), list("abc"))
    assert scores.confusions() == []
    assert [one.confused_with for one in scores.by_class()] == [None] * 3
