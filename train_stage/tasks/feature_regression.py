"""The control to pre-training on tokens: the same images, rows and masks, and the tower's own features as targets.

A frozen tower computes them in every step, from the very view that the tokens were made of.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from upath import UPath

from ...shared.errors import DataError, FingerprintMismatch, MapetError
from ...shared.images.views import Preprocess, ViewPolicy
from ...shared.runtime.distributed import World
from ...shared.tokens.store import TokenStore
from ..data.batch import Batch, LoadBatch, TeacherViews, load_batches
from ..data.dataset import TokenisedImages
from ..model.mapet import MaPeT
from ..settings import FEATURES, Settings
from ..training.task import Bands, Places
from .pretraining import PretrainingTask, refuse_other_target
from .pretraining_loss import BANDS, FeatureRegressionLoss


class Teacher(Protocol):
    """A frozen tower: the part of a tokenizer before its codes."""

    preprocess: Preprocess
    dim: int

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) uint8 -> features of every patch, float32 (B, N, dim) in raster order."""
        ...


class SavedTeacher(Protocol):
    """A tokenizer that was read and can be opened."""

    @property
    def fingerprint(self) -> str:
        """Of its codebook."""
        ...

    @property
    def path(self) -> Path | UPath:
        """Of its codebook."""
        ...

    def open(self, *, device: str) -> Teacher:
        """Opens the tower on "cpu" or "cuda"."""
        ...


def open_teacher(saved: SavedTeacher, settings: Settings, store: TokenStore, device: str, world: World) -> Teacher:
    """Opens the tower that made the tokens of a store, in every process.

    Raises:
        UsageError: the settings do not ask for its features.
        FingerprintMismatch: the codebook is not that of the tokens.
        DataError: the tower's weights are missing, or another tower lies where it was.
    """
    refuse_other_target(settings, FEATURES)
    if saved.fingerprint != store.fingerprint:
        raise FingerprintMismatch(
            f"--teacher {saved.path} is codebook {saved.fingerprint[:12]} and {store.path} holds tokens of "
            f"{store.fingerprint[:12]}; give the codebook of these tokens."
        )

    def opened() -> Teacher:
        try:
            return saved.open(device=device)
        except MapetError as error:
            raise DataError(f"--teacher {saved.path}: {error}") from None

    return world.all_or_raise(opened)


class FeatureRegression(PretrainingTask):
    """Pre-training on images and the features of their tower. The head has one output per feature, not per code."""

    bands = Bands(BANDS.count, BANDS.name, "cosine")
    target = FEATURES

    def __init__(
        self, settings: Settings, store: TokenStore, images: TokenisedImages, saved: SavedTeacher, teacher: Teacher
    ) -> None:
        super().__init__(settings, store, images)
        self.k, self.shape = teacher.dim, settings.model.shape(teacher.dim)
        self.saved, self.teacher = saved, teacher

    def loss(self, model: nn.Module, device: str, precision: str) -> FeatureRegressionLoss:
        """`FeatureRegressionLoss` of a MaPeT model."""
        features = partial(_features, self.teacher)
        return FeatureRegressionLoss(cast(MaPeT, model), self.settings, device, precision, features)

    def example_batch(self, count: int) -> Batch:
        """A batch of uninitialised tensors, with features instead of the pixels that a tower would read."""
        return replace(super().example_batch(count), features=torch.empty(count, self.shape.patches, self.k))

    def batches(self, places: Iterator[Places], workers: int, *, pin_memory: bool) -> Iterator[Batch]:
        """Batches of stored views, as the student and as the tower sees them."""
        views = TeacherViews(ViewPolicy.from_json(self.store.view), self.teacher.preprocess)
        return load_batches(LoadBatch(self.images, self.settings, views), places, workers, pin_memory=pin_memory)

    def describe(self, steps: int) -> list[tuple[str, str]]:
        """As for tokens, and the tower."""
        *rows, (name, counted) = super().describe(steps)
        counted = counted.partition("; ")[0]
        return [
            *rows,
            (name, f"{counted}; {self.k} features predicted of each predicted patch"),
            ("teacher", f"{self.saved.path}, computed in every step; its FLOPs and weights are not counted"),
        ]

    def checkpoint_metadata(self) -> dict[str, Any]:
        """As for tokens, and that the head predicts features."""
        return {**super().checkpoint_metadata(), "target": FEATURES}

    def run_metadata(self) -> dict[str, Any]:
        """As for tokens, and the codebook whose tower computes the features."""
        return {**super().run_metadata(), "target": FEATURES, "teacher": str(self.saved.path), "features": self.k}


def _features(teacher: Teacher, batch: Batch) -> Tensor:
    """The tower's features of a batch, (B, N, dim) float32 in raster order, without gradient."""
    if batch.features is not None:
        return batch.features
    assert batch.teacher_pixels is not None  # the loader adds them
    return teacher.features(batch.teacher_pixels).clone()  # of a tensor of inference mode, which autograd cannot keep
