"""The linear probe: multinomial logistic regression on frozen features."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..evaluation.base import EvaluationResult, FrozenEvaluation
from ..evaluation.classes import number_classes
from ..evaluation.embed import FrozenFeatures
from ..evaluation.held_out import HELD_OUT, split_held_out

WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_ITERATIONS = 100


class LinearProbe(FrozenEvaluation):
    """Multinomial logistic regression on standardised features, its weight decay chosen on held-out training images."""

    @property
    def name(self) -> str:
        return "linear"

    def measure(self, features: FrozenFeatures) -> EvaluationResult:
        fit = linear_probe(features.train, features.train_labels, features.val, features.val_labels)
        return EvaluationResult(self.name, {**fit.to_json(), "features": features.to_json()}, {"top1": fit.top1})


class LinearProbeFit(NamedTuple):
    """Top-1 accuracy on the test images, and the weight decay that was chosen."""

    top1: float
    weight_decay: float
    held_out_top1: dict[float, float]
    """Top-1 accuracy on the held-out training images by weight decay."""

    def to_json(self) -> dict[str, Any]:
        """How it was fitted; part of a protocol."""
        return {
            "classifier": "multinomial logistic regression on features standardised by the training set",
            "optimizer": f"L-BFGS, strong Wolfe line search, at most {_ITERATIONS} iterations",
            "weight_decays": list(WEIGHT_DECAYS),
            "weight_decay": self.weight_decay,
            "held_out_top1": [self.held_out_top1[weight_decay] for weight_decay in WEIGHT_DECAYS],
            "hyper_parameters": f"chosen on {HELD_OUT:.0%} of the training images, then refitted on all of them",
        }


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> LinearProbeFit:
    """Fits multinomial logistic regression to features and measures it once.

    Features are standardised by the training set. The weight decay with the best accuracy on a tenth of the training
    images is used to fit all of them.

    Args:
        train: (n, dim) float, features of the training images.
        labels: (n,) int64, their classes.
        test: (m, dim) float, features of the test images.
        test_labels: (m,) int64, their classes.

    Raises:
        DataError for a negative label. Only classes that occur are fitted, whatever their numbers.
    """
    mean, scale = _moments(train)
    train, test = (train - mean) / scale, (test - mean) / scale
    labels, test_labels, classes = number_classes(labels.to(train.device), test_labels.to(train.device))
    scores, start = _scores(train, labels, classes)
    weight_decay = max(scores, key=scores.__getitem__)
    classifier = logistic_regression(train, labels, weight_decay, start)
    return LinearProbeFit(_accuracy(classifier, test, test_labels), weight_decay, scores)


def held_out_accuracy(train: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy of the linear probe, with its best weight decay, on a tenth of the training images that it is not
    fitted to; arguments as in `linear_probe`. Standardisation is by all training images."""
    mean, scale = _moments(train)
    labels, _, classes = number_classes(labels.to(train.device), labels[:0].to(train.device))
    scores, _ = _scores((train - mean) / scale, labels, classes)
    return max(scores.values())


def _moments(train: Tensor) -> tuple[Tensor, Tensor]:
    return train.mean(0), train.std(0) + 1e-6


class LinearClassifier(NamedTuple):
    """Logits are features @ weight + bias."""

    weight: Tensor
    """(dim, classes)"""
    bias: Tensor
    """(classes,)"""


def _scores(train: Tensor, labels: Tensor, classes: int) -> tuple[dict[float, float], LinearClassifier]:
    """The accuracy on held-out images by weight decay, and the classifier that the search ended with."""
    choose, fit = split_held_out(len(train), train.device)
    scores: dict[float, float] = {}
    classifier = LinearClassifier(train.new_zeros(train.shape[1], classes), train.new_zeros(classes))
    # Each fit starts from the one before, which had more weight decay.
    for weight_decay in sorted(WEIGHT_DECAYS, reverse=True):
        classifier = logistic_regression(train[fit], labels[fit], weight_decay, classifier)
        scores[weight_decay] = _accuracy(classifier, train[choose], labels[choose])
    return scores, classifier


def logistic_regression(
    features: Tensor, labels: Tensor, weight_decay: float, start: LinearClassifier
) -> LinearClassifier:
    """The classifier that minimises cross-entropy + weight_decay / 2 * |weight|^2, by L-BFGS from `start`."""
    weight, bias = (tensor.clone().requires_grad_() for tensor in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(features @ weight + bias, labels) + weight_decay / 2 * weight.square().sum()
        torch.autograd.backward([loss])
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # PyTorch does not annotate LBFGS.step
    return LinearClassifier(weight.detach(), bias.detach())


def _accuracy(classifier: LinearClassifier, features: Tensor, labels: Tensor) -> float:
    return ((features @ classifier.weight + classifier.bias).argmax(1) == labels).float().mean().item()
