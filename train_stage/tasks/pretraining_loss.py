"""The loss of pre-training: color jitter and normalisation before the model, the head and what it predicts behind it:
tokens, or as a control the features of a tower."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ...shared.artifacts.codes import MAX_K_OF_UINT16
from ...shared.images.normalise import Normalise
from ..data.batch import Batch
from ..data.color_jitter import jitter
from ..model.layout import Layout
from ..model.mapet import MaPeT, drop_path_scales
from ..objectives.feature_loss import feature_loss
from ..objectives.layouts import step_layout
from ..objectives.token_loss import cross_entropy_and_grads, token_loss
from ..settings import FLEX, Settings
from ..training.task import Bands, StepInputs, TaskLoss

BANDS = Bands(8, "rank")
"""The ranks of the permutation are divided into so many bands for the accuracy by rank."""


@dataclass(frozen=True, eq=False)
class PretrainingInputs(StepInputs):
    """What a step predicts from what."""

    layout: Layout
    in_band: Tensor
    """(P, BANDS) float on the device: the band of each predicted rank, one-hot."""


def rows_at_a_time(chunk: int | None, k: int) -> int | None:
    """`execution.loss_chunk`, with K above 65,536 less by as much as K is more, so that logits take no more memory."""
    return None if chunk is None else max(chunk * min(k, MAX_K_OF_UINT16) // k, 1)


class PretrainingLoss(TaskLoss):
    """Mean cross-entropy over the predicted tokens of a batch."""

    def __init__(self, model: MaPeT, settings: Settings, device: str, precision: str) -> None:
        super().__init__()
        self.model, self.settings, self.device = model, settings, device
        self.normalise = Normalise(settings.data.mean, settings.data.std, device)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")
        self.preprocess: Callable[[Batch], Tensor] = self._preprocess
        self.loss_and_grads = cross_entropy_and_grads

    def compile_surroundings(self) -> None:
        """Compiles jitter with normalisation, and the cross-entropy of a chunk of logits."""
        self.preprocess = torch.compile(self._preprocess)
        self.loss_and_grads = torch.compile(cross_entropy_and_grads)

    def at_step(self, step: int, steps: int) -> "PretrainingInputs":
        """The layout of step `step` of `steps`, and the bands of the ranks that it predicts."""
        settings, patches = self.settings, self.model.shape.patches
        flex = settings.execution.attention == FLEX and self.device != "cpu"  # a dry run counts on the CPU
        layout = step_layout(settings.objective, patches, settings.train.seed, step, steps, self.device, flex=flex)
        in_band, predictions = _bands(layout.rank_numbers, patches - layout.visible, self.device)
        return PretrainingInputs(predictions, layout, in_band)

    def forward(self, batch: Batch, inputs: "PretrainingInputs") -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and the sum of `predict`'s measure per band of ranks (BANDS,)."""
        layout, pixels = inputs.layout, self.preprocess(batch)
        targets = self.targets(batch)[:, layout.visible :][:, layout.ranks]
        with self.autocast:
            scale = drop_path_scales(batch.uniform_draws, self.settings.model.drop_path)
            rows = self.model.predict_rows(pixels, batch.order, layout, scale)
            loss, measured = self.predict(rows, targets)
        return loss, measured.float().sum(0) @ inputs.in_band

    def targets(self, batch: Batch) -> Tensor:
        """What is predicted of each patch, in the order of the permutation: the tokens (B, N) int64."""
        return batch.tokens

    def predict(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of the head on rows (B, P, dim), and which of them are predicted correctly, (B, P)."""
        chunk = rows_at_a_time(self.settings.execution.loss_chunk, self.model.shape.k)
        return token_loss(rows, self.model.decoder, targets, chunk, self.loss_and_grads)

    def _preprocess(self, batch: Batch) -> Tensor:
        """The input of the model, float32 (B, 3, S, S): jittered, where jitter was drawn, and normalised."""
        pixels = batch.pixels.to(torch.float32, memory_format=torch.contiguous_format)
        if batch.jitter_factors is not None and batch.jitter_order is not None:
            jitter(pixels, batch.jitter_factors, batch.jitter_order)
        normalised: Tensor = self.normalise(pixels)
        return normalised


class FeatureRegressionLoss(PretrainingLoss):
    """One minus the mean cosine similarity over the predicted patches' features, which a frozen tower computes."""

    def __init__(
        self, model: MaPeT, settings: Settings, device: str, precision: str, features: Callable[[Batch], Tensor]
    ) -> None:
        """`features` gives the tower's features of a batch, (B, N, D) float32 in raster order."""
        super().__init__(model, settings, device, precision)
        self.features = features

    def targets(self, batch: Batch) -> Tensor:
        """The tower's features (B, N, D) float32, in the order of the permutation."""
        features = self.features(batch)
        return features.gather(1, batch.order[:, :, None].expand_as(features))

    def predict(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss of the head on rows (B, P, dim), and the cosine similarity of each of them, (B, P)."""
        return feature_loss(rows, self.model.decoder, targets)


@lru_cache(maxsize=512)
def _bands(ranks: tuple[int, ...], predicted: int, device: str) -> tuple[Tensor, list[int]]:
    """The band of each of the `ranks`, one-hot float (P, BANDS) on `device`, and the number of ranks in each band."""
    in_band = one_hot(torch.tensor(ranks) * BANDS.count // predicted, BANDS.count)
    return in_band.float().to(device, non_blocking=True), in_band.sum(0).tolist()
