"""The linear probe: multinomial logistic regression on frozen features."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .base import EvaluationResult, FrozenEvaluation
from .classes import number_classes
from .embed import FrozenFeatures

WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 0.1
"""Share of the training images on which the weight decay is chosen."""
_ITERATIONS = 100


class LinearProbe(FrozenEvaluation):
    """Multinomial logistic regression on standardised features, its weight decay chosen on held-out training images."""

    @property
    def name(self) -> str:
        return "linear"

    def measure(self, features: FrozenFeatures) -> EvaluationResult:
        fit = linear_probe(features.train, features.train_labels, features.val, features.val_labels)
        protocol = {
            "classifier": "multinomial logistic regression on features standardised by the training set",
            "optimizer": f"L-BFGS, strong Wolfe line search, at most {_ITERATIONS} iterations",
            "weight_decays": list(WEIGHT_DECAYS),
            "weight_decay": fit.weight_decay,
            "hyper_parameters": f"chosen on {HELD_OUT:.0%} of the training images, then refitted on all of them",
            "features": features.to_json(),
        }
        return EvaluationResult(self.name, protocol, {"top1": fit.top1})


class LinearProbeFit(NamedTuple):
    """Top-1 accuracy on the test images, and the weight decay that was chosen."""

    top1: float
    weight_decay: float


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
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    labels, test_labels, classes = number_classes(labels.to(train.device), test_labels.to(train.device))
    weight_decay, start = _choose_weight_decay(train, labels, classes)
    classifier = logistic_regression(train, labels, weight_decay, start)
    return LinearProbeFit(_accuracy(classifier, test, test_labels), weight_decay)


class LinearClassifier(NamedTuple):
    """Logits are features @ weight + bias."""

    weight: Tensor
    """(dim, classes)"""
    bias: Tensor
    """(classes,)"""


def _choose_weight_decay(train: Tensor, labels: Tensor, classes: int) -> tuple[float, LinearClassifier]:
    """The weight decay that does best on held-out images, and the classifier that the search ended with."""
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held_out = max(1, int(len(train) * HELD_OUT))
    choose, fit = shuffled[:held_out], shuffled[held_out:]
    scores: dict[float, float] = {}
    classifier = LinearClassifier(train.new_zeros(train.shape[1], classes), train.new_zeros(classes))
    # Each fit starts from the one before, which had more weight decay.
    for weight_decay in sorted(WEIGHT_DECAYS, reverse=True):
        classifier = logistic_regression(train[fit], labels[fit], weight_decay, classifier)
        scores[weight_decay] = _accuracy(classifier, train[choose], labels[choose])
    return max(scores, key=scores.__getitem__), classifier


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
