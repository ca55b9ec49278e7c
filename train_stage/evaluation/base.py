"""The interface of all evaluations: weights and labelled images in, a named result with its protocol out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ..weights.weights import Weights
from .embed import Execution, FrozenFeatures, extract_features, pooled_encoder
from .labelled import LabelledImages


@dataclass(frozen=True)
class EvaluationResult:
    """The measurements of one evaluation, with its protocol."""

    name: str
    """The evaluation's name, such as "knn"."""
    protocol: dict[str, Any]
    """Everything that is needed to repeat the measurement, as plain JSON values: hyper-parameters and how they were
    chosen, feature, preprocessing, numbers of images."""
    numbers: dict[str, float]
    """The measurements, such as {"top1": 0.71}; accuracies lie in [0, 1]."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "protocol": self.protocol, "numbers": self.numbers}


class EvaluationInputs:
    """The input of an evaluation: weights, labelled images to learn from, and labelled images to measure on.

    Several evaluations share one such object, and so its frozen features, which are extracted when first read.
    """

    def __init__(
        self,
        weights: Weights,
        train: LabelledImages,
        val: LabelledImages,
        execution: Execution,
        features: FrozenFeatures | None = None,
        *,
        patches: bool = False,
    ):
        """`features` are the weights' frozen features of these images, if they were extracted before; `patches` says
        whether those of each patch are extracted, too."""
        self.weights, self.train, self.val, self.execution = weights, train, val, execution
        self._features, self._patches = features, patches

    @cached_property
    def features(self) -> FrozenFeatures:
        """The frozen features of all images. Raises DataError for an image that cannot be read."""
        if self._features is not None:
            return self._features
        encoders = [pooled_encoder(self.weights, self.execution.device)]
        preprocess = self.weights.preprocess
        return extract_features(encoders, preprocess, self.train, self.val, self.execution, patches=self._patches)[0]


class Evaluation(ABC):
    """One way to evaluate weights. Hyper-parameters are arguments of the constructor."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A short, unique name: the key of the result in logs and tables."""

    @abstractmethod
    def evaluate(self, inputs: EvaluationInputs) -> EvaluationResult:
        """Evaluates `inputs.weights`.

        Everything, hyper-parameters included, is learned or chosen on `inputs.train`; `inputs.val` is measured once.

        Raises:
            DataError for an image that cannot be read.
        """


class FrozenEvaluation(Evaluation):
    """An evaluation that needs only the frozen features of the images."""

    reads_patches: ClassVar[bool] = False
    """Whether it needs the features of each patch, and not only the pooled ones."""

    def evaluate(self, inputs: EvaluationInputs) -> EvaluationResult:
        return self.measure(inputs.features)

    @abstractmethod
    def measure(self, features: FrozenFeatures) -> EvaluationResult:
        """Evaluates the features of any encoder, with weights or without."""


def evaluate(
    evaluations: Sequence[Evaluation],
    weights: Weights,
    train: LabelledImages,
    val: LabelledImages,
    execution: Execution | None = None,
    *,
    features: FrozenFeatures | None = None,
) -> list[EvaluationResult]:
    """Runs several evaluations on one set of weights.

    Args:
        evaluations: the evaluations to run; those that read frozen features share one pass over the images.
        weights: the weights to evaluate.
        train: labelled images to learn from, such as the neighbours of k-NN.
        val: labelled images to measure on.
        execution: batch size, loader processes and device; default 128 images, this process, the CPU.
        features: the weights' frozen features of these images, if they were extracted before.

    Returns:
        One result per evaluation, in their order.

    Raises:
        DataError for an image that cannot be read.
    """
    patches = any(isinstance(evaluation, FrozenEvaluation) and evaluation.reads_patches for evaluation in evaluations)
    inputs = EvaluationInputs(weights, train, val, execution or Execution(), features, patches=patches)
    return [evaluation.evaluate(inputs) for evaluation in evaluations]
