"""Fine-tuned segmentation as a task: images with masks, UPerNet on the encoder, pixel-wise cross-entropy."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...shared.errors import DataError, UsageError
from ...shared.images.views import Preprocess
from ...shared.randomness import seeded_torch
from ...shared.runtime.console import say
from ...shared.runtime.devices import choose_workers
from ...shared.runtime.loader import OneByOne, batches
from ..classification.layer_decay import lr_scale, without_weight_decay
from ..evaluation.embed import PRETRAINED, Execution, refuse_not_finite
from ..masked.batch import LoadMasked, MaskedBatch
from ..masked.crops import WholeImages
from ..masked.data import SegmentationData
from ..masked.masked_images import MaskedImage
from ..masked.masked_set import MaskedSet
from ..model.flops import training_flops
from ..model.shape import Shape
from ..model.upernet import UPerNet, dropped_channels, tapped_blocks
from ..segmentation.scores import Measured
from ..segmentation.sliding import measure
from ..settings import SegmentSettings
from ..training.task import Places, Task, TaskModel
from ..weights.init import start_from
from ..weights.weights import Input
from .segmenting_loss import SegmentingLoss


class SegmentingModel(TaskModel[MaskedBatch]):
    """UPerNet with one output for each of the class names."""

    name = "segmentation"

    def __init__(self, settings: SegmentSettings, shape: Shape, names: tuple[str, ...]) -> None:
        """`shape` is that of the weights; `settings` say the size of a crop. Raises UsageError if they do not fit."""
        self.settings: SegmentSettings = settings
        self.shape = replace(shape, image_size=settings.model.image_size, k=0)
        self.names = names
        if self.shape.image_size < 2 * self.shape.patch_size:
            raise UsageError(
                f"model.image_size {self.shape.image_size} is less than two patches of {self.shape.patch_size}, which "
                "UPerNet needs; give a larger one."
            )
        with torch.device("meta"):
            self._build()  # refuses more frozen blocks than there are

    def _build(self) -> UPerNet:
        model = UPerNet(self.shape, len(self.names), self.settings.model.channels)
        model.freeze(self.settings.model.freeze)
        return model

    @property
    def preprocess(self) -> Preprocess:
        """Resizes the shorter side to the size of a crop."""
        size, of = self.shape.image_size, self.input
        return Preprocess(size, "shortest", size, of.interpolation, of.mean, of.std)

    @property
    def input(self) -> Input:
        """The preprocessing of the training images."""
        data = self.settings.data
        return Input.from_json({"mean": data.mean, "std": data.std, "interpolation": data.interpolation})

    def new_model(self) -> UPerNet:
        """The model with fresh weights. The caller's random state is left alone."""
        with seeded_torch(self.settings.train.seed):
            model = self._build()
        model.grad_checkpointing = self.settings.execution.grad_checkpointing
        return model

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The blocks of the Vision Transformer."""
        return cast(UPerNet, model).blocks

    def loss(self, model: nn.Module, device: str, precision: str) -> SegmentingLoss:
        """`SegmentingLoss` of a UPerNet."""
        return SegmentingLoss(cast(UPerNet, model), self.settings, device, precision)

    def without_weight_decay(self, name: str, parameter: Tensor) -> bool:
        """1-D parameters, positions and class token."""
        return without_weight_decay(name, parameter)

    def lr_scale(self, name: str) -> float:
        """`optimizer.layer_decay` to the power of the layer's distance from the neck and the heads."""
        return lr_scale(name, self.shape.depth, self.settings.optimizer.layer_decay)

    def example_batch(self, count: int) -> MaskedBatch:
        """A batch of uninitialised tensors."""
        size = self.shape.image_size
        return MaskedBatch(
            index=torch.empty(count, dtype=torch.int64),
            pixels=torch.empty(count, 3, size, size, dtype=torch.uint8),
            mask=torch.empty(count, size, size, dtype=torch.int16),
            uniform_draws=torch.empty(count, self.shape.depth, 2),
            channel_draws=torch.empty(count, dropped_channels(self.settings.model.channels)),
            jitter_factors=torch.empty(count, 3),
            jitter_order=torch.empty(count, 3, dtype=torch.int64),
        )

    def flops_per_image(self) -> int:
        """As `torch.utils.flop_counter` counts them; what gradient checkpointing computes again does not count."""
        size = self.shape.image_size

        def loss(model: UPerNet) -> Tensor:
            head, auxiliary = model(torch.empty(1, 3, size, size))
            total: Tensor = head.sum() + auxiliary.sum()
            return total

        return training_flops(self._build, loss)

    def describe(self, steps: int) -> list[tuple[str, str]]:
        """The model, what of it is trained, and the classes."""
        shape, frozen = self.shape, self.settings.model.freeze
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in self._build().parameters())
        trained = f"; embedding and {frozen} blocks are frozen" if frozen else ""
        return [
            ("model", f"dim {shape.dim}, depth {shape.depth}, {shape.heads} heads, {count:,} parameters{trained}"),
            ("crops", f"{shape.image_size} px, {shape.patches} patches"),
            ("classes", f"{len(self.names):,}"),
        ]


class SegmentingTask(SegmentingModel, Task[MaskedBatch]):
    """Segmentation on images with masks, measured on others."""

    def __init__(self, settings: SegmentSettings, shape: Shape, data: SegmentationData) -> None:
        super().__init__(settings, shape, data.names)
        self.data = data
        self.images: MaskedSet = MaskedSet.of(data)

    def batches(self, places: Iterator[Places], workers: int, *, pin_memory: bool) -> Iterator[MaskedBatch]:
        """Batches of random crops."""
        channels = dropped_channels(self.settings.model.channels)
        load = LoadMasked(self.images, self.settings, self.preprocess, self.shape.depth, channels)
        for tensors in batches(OneByOne(load), places, workers, pin_memory=pin_memory):
            yield MaskedBatch(**tensors)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Model, preprocessing, class names, and the masks that it was trained on."""
        return {"model": self.shape.to_json(), "input": self.input.to_json(), **self.run_metadata()}

    def run_metadata(self) -> dict[str, Any]:
        """The classes of the run."""
        return {"class_names": list(self.names), "masks_sha256": self.images.masks_sha256}

    def start_from(self, model: nn.Module, weights: str | Path) -> dict[str, str]:
        """`weights.init.start_from`: neck and heads keep their fresh weights."""
        return start_from(model, weights)

    def evaluation_interval(self, steps_per_epoch: int) -> int | None:
        """`validation.every`."""
        return self.settings.validation.every

    def evaluator(self, device: str) -> "SegmentationValidation | None":
        """Mean IoU and pixel accuracy of the validation images, if they are measured during the run."""
        return None if self.settings.validation.every is None else SegmentationValidation(self, device)

    def measure(self, tensors: dict[str, Tensor], shown: set[str], execution: Execution) -> Measured:
        """What weights of the model achieve on the validation images, by sliding windows; `shown` are keys whose
        predictions are kept.

        Raises DataError for an image or a mask that cannot be read, and for logits that are not finite.
        """
        segmenter = UPerNetSegmenter(self, tensors, execution.device)
        whole = WholeImages(self.data.val, self.data.rule, self.preprocess)
        return measure([segmenter], whole, self.data.classes, shown, execution)[0]


class UPerNetSegmenter:
    """Weights of a run, as `sliding.measure` takes them."""

    classifier = "UPerNet"

    def __init__(self, task: SegmentingTask, tensors: dict[str, Tensor], device: str) -> None:
        settings = task.settings
        self._model = task.new_model().eval()
        self._model.load_state_dict({name: tensor.detach().cpu() for name, tensor in tensors.items()})
        self._model.to(device)
        self.features = "from scratch" if settings.model.from_scratch else PRETRAINED
        taps = ", ".join(map(str, tapped_blocks(task.shape.depth)))
        self.protocol = {
            "feature": f"rows after blocks {taps} of {task.shape.depth} (from 0)",
            "classifier": "UPerNet with GroupNorm, trained with the encoder",
            "train_images": len(task.images),
            "settings": settings.to_json(),
            "hyper_parameters": "fixed beforehand; the last weights of the run",
        }

    def logits(self, images: Sequence[MaskedImage], windows: Tensor) -> Tensor:
        """Logits (B, classes, S, S) of windows (B, 3, S, S), in full float32 precision."""
        # cuDNN would otherwise round float32 to TF32.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            logits = self._model.segment(windows)
        refuse_not_finite(logits, [pair.image for pair in images], "logits")
        return logits


class SegmentationValidation:
    """The `RunEvaluator` of segmentation."""

    def __init__(self, task: SegmentingTask, device: str) -> None:
        workers = choose_workers(task.settings.data.workers, device)
        self._task, self._execution = task, Execution(task.settings.validation.batch_size, workers, device)

    def measure(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        """ "mean_iou" and "pixel_accuracy", in [0, 1]."""
        scores = self._task.measure(tensors, set(), self._execution).scores
        say(
            f"Validation: mean IoU {scores.mean_iou:.2%}, pixel accuracy {scores.pixel_accuracy:.2%} of "
            f"{len(self._task.data.val):,} images."
        )
        return {"mean_iou": scores.mean_iou, "pixel_accuracy": scores.pixel_accuracy}


def refuse_other_masks(out: Path, before: dict[str, Any], images: MaskedSet) -> None:
    """Raises DataError unless the images have the masks of the run in `out`, of whose checkpoint `before` are the
    metadata."""
    if before["masks_sha256"] != images.masks_sha256 or tuple(before["class_names"]) != images.names:
        raise DataError(
            f"{out} was begun with other masks, ignored values or class names ({len(before['class_names'])} classes, "
            f"now {len(images.names)}); give the same ones or another --out."
        )
