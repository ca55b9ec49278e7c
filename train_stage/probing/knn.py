"""k nearest neighbours on frozen features."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ..evaluation.base import EvaluationResult, FrozenEvaluation
from ..evaluation.classes import number_classes
from ..evaluation.embed import FrozenFeatures

_CHUNK = 1024
"""How many validation images have their similarities to all training images in memory."""


@dataclass(frozen=True)
class KNearestNeighbours(FrozenEvaluation):
    """k-NN by cosine of features centred by the training mean (SimpleShot, arXiv 1911.04623).

    The defaults of `k` and `temperature` are DINO's (arXiv 2104.14294).
    """

    k: int = 20
    temperature: float = 0.07

    @property
    def name(self) -> str:
        return "knn"

    def measure(self, features: FrozenFeatures) -> EvaluationResult:
        top1 = knn_accuracy(
            features.train, features.train_labels, features.val, features.val_labels, self.k, self.temperature
        )
        protocol = {
            "k": min(self.k, len(features.train)),
            "temperature": self.temperature,
            "similarity": "cosine of features centred by the mean of the training features",
            "vote": "exp(similarity / temperature)",
            "hyper_parameters": "fixed beforehand",
            "features": features.to_json(),
        }
        return EvaluationResult(self.name, protocol, {"top1": top1})


def knn_accuracy(
    train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Top-1 accuracy of the weighted vote of the k nearest training images by cosine of centred features.

    Args:
        train: (n, dim) float, features of the training images.
        labels: (n,) int64, their classes.
        test: (m, dim) float, features of the images to classify.
        test_labels: (m,) int64, their classes.
        k: the number of neighbours; all training images if there are fewer.
        temperature: a neighbour's vote weighs exp(similarity / temperature).

    Raises:
        DataError for a negative label. Only classes that occur get votes, whatever their numbers.
    """
    train, test = (normalize(features - train.mean(0), dim=1) for features in (train, test))
    labels, test_labels, classes = number_classes(labels.to(train.device), test_labels.to(train.device))
    one_hot_labels = one_hot(labels, classes).float()
    correct = 0
    for queries, truth in zip(torch.split(test, _CHUNK), torch.split(test_labels, _CHUNK), strict=True):
        similarity, nearest = (queries @ train.T).topk(min(k, len(train)), dim=1)
        votes = (similarity / temperature).exp()[:, :, None] * one_hot_labels[nearest]
        correct += int((votes.sum(1).argmax(1) == truth).sum())
    return correct / len(test)
