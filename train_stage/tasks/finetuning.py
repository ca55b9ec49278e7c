"""Fine-tuning as a task: labelled images, a classifier on the pre-trained encoder, and soft cross-entropy."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...shared.errors import DataError
from ...shared.randomness import seeded_torch
from ...shared.runtime.console import say
from ...shared.runtime.devices import choose_workers
from ...shared.runtime.loader import batches
from ...shared.sources.records import ImageRecord
from ..classification.augment import Augment
from ..classification.batch import LabelledBatch, LoadLabelled
from ..classification.labelled_set import LabelledSet
from ..classification.layer_decay import lr_scale, without_weight_decay
from ..classification.logits import classify, top_k
from ..evaluation.embed import Execution
from ..model.classifier import Classifier
from ..model.flops import training_flops
from ..model.shape import Shape
from ..settings import FinetuneSettings
from ..training.task import Places, Task, TaskModel
from ..weights.init import start_from
from ..weights.read import load_weights
from ..weights.weights import Input, Weights
from .finetuning_loss import FinetuningLoss


class FinetuningModel(TaskModel[LabelledBatch]):
    """A classifier with one output for each of the class names."""

    name = "finetuning"

    def __init__(self, settings: FinetuneSettings, shape: Shape, names: tuple[str, ...]) -> None:
        """`shape` is that of the weights; `settings` say the image size. Raises UsageError if they do not fit."""
        self.settings: FinetuneSettings = settings
        self.shape = replace(shape, image_size=settings.model.image_size, k=0)
        self.names = names
        self.computed_together = 2 if settings.augment.mixes else 1
        self.augment = Augment(settings)
        with torch.device("meta"):
            self._build()  # refuses more frozen blocks than there are

    def _build(self) -> Classifier:
        model = Classifier(self.shape, len(self.names))
        model.freeze(self.settings.model.freeze)
        return model

    def new_model(self) -> Classifier:
        """The classifier with fresh weights. The caller's random state is left alone."""
        with seeded_torch(self.settings.train.seed):
            model = self._build()
        model.grad_checkpointing = self.settings.execution.grad_checkpointing
        return model

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The blocks of the Vision Transformer."""
        return cast(Classifier, model).blocks

    def loss(self, model: nn.Module, device: str, precision: str) -> FinetuningLoss:
        """`FinetuningLoss` of a classifier."""
        return FinetuningLoss(cast(Classifier, model), self.settings, device, precision)

    def without_weight_decay(self, name: str, parameter: Tensor) -> bool:
        """1-D parameters, positions and class token."""
        return without_weight_decay(name, parameter)

    def lr_scale(self, name: str) -> float:
        """`optimizer.layer_decay` to the power of the layer's distance from the head."""
        return lr_scale(name, self.shape.depth, self.settings.optimizer.layer_decay)

    def example_batch(self, count: int) -> LabelledBatch:
        """A batch of uninitialised tensors."""
        size = self.shape.image_size
        return LabelledBatch(
            index=torch.empty(count, dtype=torch.int64),
            pixels=torch.empty(count, 3, size, size, dtype=torch.uint8),
            classes=torch.empty(count, dtype=torch.int64),
            uniform_draws=torch.empty(count, self.shape.depth, 2),
        )

    def flops_per_image(self) -> int:
        """As `torch.utils.flop_counter` counts them; what gradient checkpointing computes again does not count."""
        size = self.shape.image_size
        return training_flops(self._build, lambda model: model(torch.empty(1, 3, size, size)).sum())

    def describe(self, steps: int) -> list[tuple[str, str]]:
        """The model, what of it is trained, and the classes."""
        shape, frozen = self.shape, self.settings.model.freeze
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in self._build().parameters())
        trained = f"; embedding and {frozen} blocks are frozen" if frozen else ""
        return [
            ("model", f"dim {shape.dim}, depth {shape.depth}, {shape.heads} heads, {count:,} parameters{trained}"),
            ("images", f"{shape.image_size} px, {shape.patches} patches"),
            ("classes", f"{len(self.names):,}"),
        ]


class FinetuningTask(FinetuningModel, Task[LabelledBatch]):
    """Fine-tuning on labelled images, measured on others."""

    def __init__(
        self,
        settings: FinetuneSettings,
        shape: Shape,
        images: LabelledSet,
        val: Sequence[ImageRecord],
        val_classes: Tensor,
    ) -> None:
        """`val_classes` are the classes of the validation images `val`, (m,) int64."""
        super().__init__(settings, shape, images.names)
        self.images: LabelledSet = images
        self.val, self.val_classes = val, val_classes

    def batches(self, places: Iterator[Places], workers: int, *, pin_memory: bool) -> Iterator[LabelledBatch]:
        """Batches of augmented images."""
        load = LoadLabelled(self.images, self.settings, self.shape.depth, self.augment)
        for tensors in batches(load, places, workers, pin_memory=pin_memory):
            yield LabelledBatch(**tensors)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Model, preprocessing, class names, and the labels that it was trained on."""
        return {
            "model": self.shape.to_json(),
            "input": self._input().to_json(),
            "class_names": list(self.names),
            "labels_sha256": self.images.labels_sha256,
        }

    def run_metadata(self) -> dict[str, Any]:
        """The classes of the run."""
        return {"class_names": list(self.names), "labels_sha256": self.images.labels_sha256}

    def start_from(self, model: nn.Module, weights: str | Path) -> dict[str, str]:
        """`weights.init.start_from`; a head is kept only if it is one for the same class names."""
        same = load_weights(weights).class_names == self.names
        return start_from(model, weights, leave_out=() if same else ("head.weight", "head.bias"))

    def evaluation_interval(self, steps_per_epoch: int) -> int:
        """`validation.every`, or the steps of an epoch."""
        return self.settings.validation.every or steps_per_epoch

    def evaluator(self, device: str) -> "Validation":
        """Top-1, top-5 and cross-entropy of the validation images."""
        return Validation(self, device)

    def _input(self) -> Input:
        data, crop = self.settings.data, self.settings.validation.crop
        fields = {"mean": data.mean, "std": data.std, "interpolation": data.interpolation, "crop_pct": crop}
        return Input.from_json(fields)

    def weights(self, tensors: dict[str, Tensor]) -> Weights:
        """The classifier's weights with all that is needed to use them."""
        on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        return Weights(
            Path("the run's weights"), self.shape, on_cpu, self._input(), self.settings.train.seed, self.names
        )


class Validation:
    """The `RunEvaluator` of fine-tuning."""

    def __init__(self, task: FinetuningTask, device: str) -> None:
        self._task = task
        settings = task.settings
        workers = choose_workers(settings.data.workers, device)
        self._execution = Execution(settings.validation.batch_size, workers, device)

    def measure(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        """Accuracies in [0, 1] as "top1" and "top5", and the mean cross-entropy in nats as "loss"."""
        task = self._task
        logits = classify(task.weights(tensors), task.val, self._execution)
        top1, top5 = (top_k(logits, task.val_classes, k).float().mean().item() for k in (1, 5))
        say(f"Validation: top-1 {top1:.2%}, top-5 {top5:.2%} of {len(task.val):,} images.")
        return {"top1": top1, "top5": top5, "loss": cross_entropy(logits, task.val_classes).item()}


def refuse_other_labels(out: Path, before: dict[str, Any], images: LabelledSet) -> None:
    """Raises DataError unless the images have the labels of the run in `out`, of whose checkpoint `before` are the
    metadata."""
    if before["labels_sha256"] != images.labels_sha256:
        raise DataError(
            f"{out} was begun with other classes or labels ({len(before['class_names'])} classes, now "
            f"{len(images.names)}); give the same images or another --out."
        )
