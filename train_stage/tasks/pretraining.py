"""Pre-training as a task: images joined with their tokens, MaPeT, and the cross-entropy of predicted tokens."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...shared.errors import DataError, FingerprintMismatch, UsageError
from ...shared.randomness import seeded_torch
from ...shared.runtime.distributed import World
from ...shared.runtime.memory import as_text, free_bytes
from ...shared.tokens.store import TokenStore
from ..data.batch import Batch, LoadBatch, load_batches
from ..data.dataset import TokenisedImages
from ..data.join import join
from ..model.flops import training_flops
from ..model.mapet import MaPeT
from ..model.shape import Shape
from ..objectives.layouts import step_layout
from ..objectives.token_loss import token_loss
from ..probing.run_probe import RunProbe
from ..settings import FEATURES, FLEX, TOKENS, ObjectiveSettings, Settings
from ..training.task import Places, Task, TaskModel
from ..weights.init import start_from
from .pretraining_loss import BANDS, PretrainingLoss

_LEAST_OF_FLEX = 16
"""Dimensions of a head for which FlexAttention generates kernels."""


class PretrainingModel(TaskModel[Batch]):
    """MaPeT and its loss, for a codebook of `k` codes."""

    name = "pretraining"
    bands = BANDS
    target = TOKENS

    def __init__(self, settings: Settings, k: int) -> None:
        """Raises UsageError if the settings want another target than `target`, or FlexAttention of small heads."""
        refuse_other_target(settings, self.target)
        self.settings: Settings = settings
        self.k = k
        self.shape = settings.model.shape(k)
        if settings.execution.attention == FLEX and self.shape.dim < _LEAST_OF_FLEX * self.shape.heads:
            raise UsageError(
                f"execution.attention=flex needs heads of at least {_LEAST_OF_FLEX} dimensions; this model has "
                f"{self.shape.heads} heads in {self.shape.dim}. Leave it out."
            )

    def new_model(self) -> MaPeT:
        """MaPeT with fresh weights. The caller's random state is left alone."""
        with seeded_torch(self.settings.train.seed):
            model = MaPeT(self.shape)
        model.grad_checkpointing = self.settings.execution.grad_checkpointing
        return model

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The blocks of the Vision Transformer."""
        return cast(MaPeT, model).blocks

    def loss(self, model: nn.Module, device: str, precision: str) -> PretrainingLoss:
        """`PretrainingLoss` of a MaPeT model."""
        return PretrainingLoss(cast(MaPeT, model), self.settings, device, precision)

    def without_weight_decay(self, name: str, parameter: Tensor) -> bool:
        """Biases, norms, LayerScale, positions and class token."""
        return parameter.ndim == 1 or name in ("pos_embed", "cls_token")

    def example_batch(self, count: int) -> Batch:
        """A batch of uninitialised tensors; not even `order` holds permutations."""
        shape, has_jitter = self.shape, self.settings.data.color_jitter > 0
        return Batch(
            index=torch.empty(count, dtype=torch.int64),
            pixels=torch.empty(count, 3, shape.image_size, shape.image_size, dtype=torch.uint8),
            order=torch.empty(count, shape.patches, dtype=torch.int64),
            tokens=torch.empty(count, shape.patches, dtype=torch.int64),
            uniform_draws=torch.empty(count, shape.depth, 2),
            jitter_factors=torch.empty(count, 3) if has_jitter else None,
            jitter_order=torch.zeros(count, 3, dtype=torch.int64) if has_jitter else None,
        )

    def flops_per_image(self) -> int:
        """As `torch.utils.flop_counter` counts them; what gradient checkpointing computes again does not count."""
        return flops_per_image(self.settings, self.k)

    def describe(self, steps: int) -> list[tuple[str, str]]:
        """The model, the objective, and the rows per image."""
        shape, settings = self.shape, self.settings
        layout = step_layout(settings.objective, shape.patches, settings.train.seed, 0, steps, "cpu")
        queries = f" + {len(layout.ranks)} query rows" if layout.queries else ""
        sizes = f"dim {shape.dim}, depth {shape.depth}, {shape.heads} heads"
        predicted = f"{len(layout.ranks)} tokens predicted, K = {shape.k}"
        return [
            ("model", f"{sizes}, {parameters_of(shape):,} parameters"),
            ("objective", f"{settings.objective.name}: {layout.visible} of {shape.patches} patches given"),
            ("rows per image", f"{layout.content_rows} content rows{queries}; {predicted}"),
        ]


def refuse_other_target(settings: Settings, target: str) -> None:
    """Raises UsageError unless `objective.target` of the settings is `target`."""
    asked = settings.objective.target
    if asked == FEATURES != target:
        raise UsageError(
            "objective.target=features regresses what a tower computes; give train pretrain its codebook, that of the "
            "tokens, with --teacher."
        )
    if asked != target:
        raise UsageError(
            "--teacher is read by objective.target=features only; add --set objective.target=features, or leave it out."
        )


class PretrainingTask(PretrainingModel, Task[Batch]):
    """Pre-training on images and their tokens."""

    def __init__(self, settings: Settings, store: TokenStore, images: TokenisedImages) -> None:
        super().__init__(settings, store.k)
        self.store = store
        self.images: TokenisedImages = images

    def batches(self, places: Iterator[Places], workers: int, *, pin_memory: bool) -> Iterator[Batch]:
        """Batches of stored views, tokens and permutations."""
        return load_batches(LoadBatch(self.images, self.settings), places, workers, pin_memory=pin_memory)

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Model, normalisation, and the tokens that it was trained on."""
        data = self.settings.data
        return {
            "model": self.shape.to_json(),
            "input": {"mean": data.mean, "std": data.std, "interpolation": data.interpolation},
            "codebook_fingerprint": self.store.fingerprint,
            "view": self.store.view,
        }

    def run_metadata(self) -> dict[str, Any]:
        """The tokens of the run."""
        return {
            "tokens": str(self.store.path),
            "view": self.store.view,
            "codebook_fingerprint": self.store.fingerprint,
        }

    def start_from(self, model: nn.Module, weights: str | Path) -> dict[str, str]:
        """`weights.init.start_from`."""
        return start_from(cast(MaPeT, model), weights, target=self.target)

    def evaluation_interval(self, steps_per_epoch: int) -> int | None:
        """`probe.every`, if there are images to probe on."""
        probe = self.settings.probe
        return None if probe.images is None else probe.every

    def evaluator(self, device: str) -> "ProbeOfRun | None":
        """k-NN, and the linear probe if asked for, on the labelled images of `probe.images` and `probe.val`."""
        return ProbeOfRun(self.settings, device, self.k) if self.settings.probe.images is not None else None


class ProbeOfRun:
    """The `RunEvaluator` of pre-training: `RunProbe` of a model that predicts `k` codes."""

    def __init__(self, settings: Settings, device: str, k: int) -> None:
        """Raises DataError if the labelled images cannot be read."""
        self._probe, self._k = RunProbe(settings, device), k

    def measure(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        """Top-1 accuracies in [0, 1], as "knn" and "linear"."""
        return self._probe.measure(tensors, self._k)


def join_images(images: Any, store: TokenStore, settings: Settings, world: World) -> TokenisedImages:
    """The images of a run joined with their tokens as its settings ask for (`join.join`)."""
    data = settings.data
    return join(images, store, data.skip_missing, world, shuffle=data.shuffle, cache=data.cache)


def refuse_large_head(store: TokenStore, dim: int) -> None:
    """Raises DataError if the head of a model of width `dim` alone, K x dim float32, does not fit into free memory."""
    needed, free = 4 * store.k * dim, free_bytes()
    if needed > free:
        raise DataError(
            f"{store.path}: a head for K = {store.k} codes has {as_text(needed)} of weights, and {as_text(free)} of "
            "memory are free; use tokens of a smaller codebook, a smaller model.dim, or a machine with more memory."
        )


def refuse_other_tokens(out: Path, before: dict[str, Any], store: TokenStore) -> None:
    """Checks that a run may resume on the tokens of `store`; `before` is the metadata of its checkpoint.

    Raises FingerprintMismatch for tokens of another codebook, UsageError for other stored views.
    """
    if before["codebook_fingerprint"] != store.fingerprint:
        raise FingerprintMismatch(
            f"{out} was trained on tokens of codebook {before['codebook_fingerprint'][:12]} and {store.path} holds "
            f"tokens of {store.fingerprint[:12]}; give the same tokens or another --out."
        )
    view = before["view"]
    if view != store.view:
        raise UsageError(
            f"{out} was begun with the views {view} of each image and {store.path} now has {store.view}; "
            "give tokens with the same views or another --out."
        )


def flops_per_image(settings: Settings, k: int) -> int:
    """Floating-point operations of forward and backward for one image, as `torch.utils.flop_counter` counts them.

    Where `objective.visible` changes from step to step, their mean over its range, in which they are quadratic. What
    gradient checkpointing computes again does not count.
    """
    objective = settings.objective
    if objective.name == "mim" or objective.visible_to is None:
        return _flops_of(settings, objective, k)
    low, high = sorted((objective.visible, objective.visible_to))
    counted = sorted({low, (low + high) // 2, high})
    flops = [_flops_of(settings, replace(objective, visible=visible, visible_to=None), k) for visible in counted]
    quadratic = np.polyfit(counted, flops, len(counted) - 1)
    return round(float(np.polyval(quadratic, np.arange(low, high + 1)).mean()))


def _flops_of(settings: Settings, objective: ObjectiveSettings, k: int) -> int:
    """FLOPs for one image with the layout that `objective` has in every step."""
    shape = settings.model.shape(k)
    layout = step_layout(objective, shape.patches, settings.train.seed, 0, 1, "cpu")

    def loss(model: MaPeT) -> Tensor:
        images = torch.empty(1, 3, shape.image_size, shape.image_size)
        order = torch.empty(1, shape.patches, dtype=torch.int64)
        targets = torch.empty(1, len(layout.ranks), dtype=torch.int64)
        return token_loss(model.predict_rows(images, order, layout), model.decoder, targets)[0]

    return training_flops(lambda: MaPeT(shape), loss)


def parameters_of(shape: Shape) -> int:
    """The number of parameters of the pre-training model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MaPeT(shape).parameters())
