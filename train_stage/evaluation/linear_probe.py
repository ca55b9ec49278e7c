"""The linear probe: multinomial logistic regression on frozen features."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_SHARE_TO_CHOOSE = 0.1


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Top-1 accuracy of multinomial logistic regression on features (n, dim), labels (n,) int64.

    Features are standardised by the training set. The weight decay that does best on a tenth of the training images
    is used on all of them.
    """
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    labels, test_labels = labels.to(train.device), test_labels.to(train.device)
    classes = int(max(labels.max(), test_labels.max())) + 1
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held_out = max(1, int(len(train) * _SHARE_TO_CHOOSE))
    choose, fit = shuffled[:held_out], shuffled[held_out:]
    scores, start = {}, None
    for decay in sorted(_WEIGHT_DECAYS, reverse=True):
        start = _logistic_regression(train[fit], labels[fit], classes, decay, start)
        scores[decay] = _accuracy(start, train[choose], labels[choose])
    best = max(scores, key=scores.__getitem__)
    return _accuracy(_logistic_regression(train, labels, classes, best, start), test, test_labels)


Classifier = tuple[Tensor, Tensor]


def _logistic_regression(
    features: Tensor, labels: Tensor, classes: int, decay: float, start: Classifier | None
) -> Classifier:
    """Weights (dim, classes) and bias (classes,) that minimise cross-entropy + decay / 2 * |weights|^2."""
    blank = (features.new_zeros(features.shape[1], classes), features.new_zeros(classes))
    weight, bias = (tensor.clone().requires_grad_() for tensor in start or blank)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(features @ weight + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _accuracy(classifier: Classifier, features: Tensor, labels: Tensor) -> float:
    weight, bias = classifier
    return ((features @ weight + bias).argmax(1) == labels).float().mean().item()
