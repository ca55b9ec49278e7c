"""The seam between the machinery of a run and what it trains.

Trainer, parallelism and dry run know a `TaskModel`; run folder, resume, checkpoints, metrics, order of images and
signals know a `Task`. Neither knows which task it is: pre-training (`tasks/pretraining.py`) is the first one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..data.image_set import ImageSet
from ..settings import RunSettings

Places = Sequence[tuple[int, int]]
"""Samples: (epoch, image number)."""


class BatchLike(Protocol):
    """What the machinery needs of a task's batch: its images, and a copy of it on a device."""

    @property
    def index(self) -> Tensor:
        """(B,) int64: the numbers of the images."""
        ...

    def to(self, device: torch.device | str) -> "BatchLike":
        """The batch on `device`."""
        ...


BatchT = TypeVar("BatchT", bound=BatchLike)


@dataclass(frozen=True)
class Bands:
    """Predictions are counted in `count` bands, such as ranks of the permutation; the `measure` of each is logged as
    `measure`_by_`name`, unless `name` is None."""

    count: int = 1
    name: str | None = None
    measure: str = "accuracy"
    """What the sum of a band over its predictions is: accuracy, where right predictions count 1, or cosine."""


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What is the same for all images of a step; a task adds fields of its own."""

    predictions: Sequence[int]
    """Predictions per image in each band."""


class TaskLoss(nn.Module, ABC):
    """The loss of a task: all of a step between a batch on the device and a number to differentiate."""

    @abstractmethod
    def compile_surroundings(self) -> None:
        """Compiles what is worth compiling besides the model's blocks, which are compiled one by one."""

    @abstractmethod
    def at_step(self, step: int, steps: int) -> StepInputs:
        """What step `step` of `steps` draws for the whole batch; the second argument of `forward`."""

    @abstractmethod
    def forward(self, batch: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, float32 scalar, and the number of right predictions (or whatever `Bands.measure` is
        the mean of) per band (bands,) float32."""


class TaskModel(ABC, Generic[BatchT]):
    """The model and the loss of a task, without any data."""

    name: str
    """As it stands in checkpoints and run.json."""
    settings: RunSettings
    bands = Bands()
    computed_together = 1
    """A process computes multiples of so many images at once: 2 where an image is mixed with its neighbour."""

    @abstractmethod
    def new_model(self) -> nn.Module:
        """A model with fresh weights, drawn from `train.seed`, on the default device."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The blocks of a model: what is compiled, checkpointed and sharded one by one."""

    @abstractmethod
    def loss(self, model: nn.Module, device: str, precision: str) -> TaskLoss:
        """The loss of `model` on `device`, computed in "float32" or under "bfloat16" autocast."""

    @abstractmethod
    def without_weight_decay(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is exempt from weight decay."""

    def lr_scale(self, name: str) -> float:
        """The factor of a parameter's learning rate; the largest one is 1."""
        return 1.0

    @abstractmethod
    def example_batch(self, count: int) -> BatchT:
        """A batch of `count` images without content, for estimates."""

    @abstractmethod
    def flops_per_image(self) -> int:
        """Floating-point operations of forward and backward for one image, without recomputation."""

    @abstractmethod
    def describe(self, steps: int) -> list[tuple[str, str]]:
        """Rows for the table of a dry run: the model and what it computes."""


class Task(TaskModel[BatchT]):
    """A `TaskModel` with its images."""

    images: ImageSet

    @abstractmethod
    def batches(self, places: Iterator[Places], workers: int, *, pin_memory: bool) -> Iterator[BatchT]:
        """Loads the samples of each list of places as one batch, in order."""

    @abstractmethod
    def checkpoint_metadata(self) -> dict[str, Any]:
        """What a checkpoint records of the task, as JSON: all that is needed to use the weights, and what they saw."""

    @abstractmethod
    def run_metadata(self) -> dict[str, Any]:
        """What run.json records of the task, as JSON."""

    @abstractmethod
    def start_from(self, model: nn.Module, weights: str | Path) -> dict[str, str]:
        """Copies weights into a fresh model. Returns the "file" that they were read from and its "sha256"."""

    @abstractmethod
    def evaluation_interval(self, steps_per_epoch: int) -> int | None:
        """Steps between evaluations by `evaluator`, which also follows the last step; None for none at all."""

    @abstractmethod
    def evaluator(self, device: str) -> "RunEvaluator | None":
        """What measures the weights during the run, if the settings ask for it."""


class RunEvaluator(Protocol):
    """Measures the weights during a run (probing/run_probe.py is the first)."""

    def measure(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        """Named numbers in [0, 1] of these weights, under the names of the model's parameters."""
        ...
