"""The state of a run and what a step does to it: model, optimizer, schedule, moving average."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...shared.errors import DataError
from ...shared.images.normalise import Normalise
from ...shared.runtime.devices import refuse_missing_compiler
from ...shared.runtime.distributed import World
from ..data.color_jitter import jitter
from ..model.layout import Layout
from ..model.mapet import MaPeT, drop_path_scales
from ..objectives.layouts import step_layout
from ..objectives.token_loss import cross_entropy_and_grads, token_loss
from ..settings import OptimizerSettings, Settings
from ..weights.checkpoint import EMA, MODEL, OPTIMIZER, Tensors
from .bad_steps import BadStep, LossWatch
from .parallel import fill, fill_optimizer, full_tensor, gradient_sync, optimizer_tensors, wrap_parallel
from .plan import Plan
from .step_metrics import BANDS, StepMetrics

_MOST_BAD_STEPS = 100


class Trainer:
    """Everything that changes from step to step."""

    def __init__(self, settings: Settings, k: int, plan: Plan, world: World, device: str):
        self.settings, self.plan, self.world, self.device = settings, plan, world, device
        torch.manual_seed(settings.train.seed)
        self.model = MaPeT(settings.model.shape(k)).to(device).train()
        self.model.grad_checkpointing = settings.execution.grad_checkpointing
        if settings.execution.compile:
            refuse_missing_compiler()
            for block in self.model.blocks:
                block.compile()
        self._loss: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.ema: dict[str, Tensor] = {}
        self.watch = LossWatch(settings.train.spike)

    def prepare(self) -> None:
        """Spreads the model over the processes and makes the optimizer; what `model` holds now is where it starts."""
        settings, plan = self.settings, self.plan
        inner = PretrainingLoss(self.model, settings, self.device)
        if settings.execution.compile:
            inner.preprocess, inner.loss_and_grads = (
                torch.compile(inner.preprocess),
                torch.compile(inner.loss_and_grads),
            )
        self._loss = wrap_parallel(inner, self.model.blocks, settings.execution.parallel, self.world, self.device)
        self.optimizer = _adamw(self.model, settings.optimizer)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=plan.steps - plan.warmup,
            lr_min=settings.optimizer.min_lr,
            warmup_t=plan.warmup,
            warmup_lr_init=settings.optimizer.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        if settings.train.ema is not None:
            self.ema = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
            self._average = get_ema_multi_avg_fn(settings.train.ema)

    def layout(self, step: int) -> Layout:
        """What step `step` predicts from what."""
        settings = self.settings
        return step_layout(
            settings.objective, self.model.shape.patches, settings.train.seed, step, self.plan.steps, self.device
        )

    def step(self, step: int, parts: Iterable[dict[str, Tensor]]) -> StepMetrics:
        """One optimizer step on this process's share of a global batch, in `plan.parts` parts of equal size.

        Raises DataError for the hundredth bad step in a row if they are skipped.
        """
        self.schedule.step_update(step)
        layout, count = self.layout(step), self.plan.parts
        of_band, guesses = _bands(layout.rank_numbers, self.model.shape.patches - layout.visible, self.device)
        sums = torch.zeros(1 + BANDS, device=self.device)
        for index, part in enumerate(parts):
            moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in part.items()}
            with gradient_sync(self._loss, now=index == count - 1):
                loss, right = self._loss(moved, layout)
                (loss / count).backward()
            sums += torch.cat([loss.detach()[None] / count, right.float().sum(0) @ of_band])
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        loss, right = sums[0] / self.world.size, sums[1:]
        limit = self.settings.optimizer.clip_grad
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit or float("inf")))
        problem = self._reason_to_skip(step, loss, norm)
        if problem is None:
            self.optimizer.step()
            if self.ema:
                self._average(list(self.ema.values()), [p.detach() for p in self.model.parameters()], None)
        self.optimizer.zero_grad(set_to_none=True)
        lr, images = self.optimizer.param_groups[0]["lr"], self.settings.train.batch_size
        return StepMetrics(loss, right, [images * count for count in guesses], norm, images, lr, problem)

    def _reason_to_skip(self, step: int, loss: Tensor, norm: Tensor) -> str | None:
        """Why this step's update is left out, or None. All processes know the same loss and norm, so they agree."""
        train = self.settings.train
        if train.on_bad_step == "stop" and train.spike is None:
            return None  # nobody need wait for the loss: `Logbook` finds the NaN before anything is written
        problem = self.watch.problem(loss.item(), norm.item())
        if problem and train.on_bad_step == "stop":
            raise BadStep(step + 1, problem)
        if self.watch.in_a_row >= _MOST_BAD_STEPS:
            raise DataError(
                f"{self.watch.in_a_row} steps in a row were bad, the last one with {problem}; lower optimizer.lr, or "
                "set train.precision=float32."
            )
        return problem

    def weights(self) -> dict[str, Tensor]:
        """The weights to use, whole: their moving average, where there is one. Every process must ask for them."""
        return {name: full_tensor(tensor) for name, tensor in (self.ema or self.model.state_dict()).items()}

    def tensors(self) -> Tensors:
        """What a checkpoint holds, whole; every process must ask for it."""
        content = {MODEL: self.model.state_dict(), OPTIMIZER: optimizer_tensors(self.model, self.optimizer)}
        if self.ema:
            content[EMA] = self.ema
        return {
            name: {key: full_tensor(tensor) for key, tensor in tensors.items()} for name, tensors in content.items()
        }

    def restore(self, tensors: Tensors, loss_watch: dict[str, Any]) -> None:
        """Puts back what `tensors` and `watch.to_json` gave; call it after `prepare`."""
        parameters = dict(self.model.named_parameters())
        for target, name in ((parameters, MODEL), (self.ema, EMA)):
            for key in target:
                fill(target[key], tensors[name][key])
        fill_optimizer(self.model, self.optimizer, tensors[OPTIMIZER])
        self.watch.restore(loss_watch)


@lru_cache(maxsize=512)
def _bands(ranks: tuple[int, ...], predicted: int, device: str) -> tuple[Tensor, list[int]]:
    """Which band each of the `ranks` lies in, float (P, BANDS) on `device` with a 1 a row, and how many lie in each."""
    of_band = one_hot(torch.tensor(ranks) * BANDS // predicted, BANDS)
    return of_band.float().to(device, non_blocking=True), of_band.sum(0).tolist()


class PretrainingLoss(nn.Module):
    """What is around the model in a step: jitter and normalisation before it, head and cross-entropy behind it."""

    def __init__(self, model: MaPeT, settings: Settings, device: str):
        super().__init__()
        self.model, self.settings, self.loss_and_grads = model, settings, cross_entropy_and_grads
        self.normalise = Normalise(settings.data.mean, settings.data.std, device)
        precision = settings.train.precision
        chosen = precision if precision != "auto" else "bfloat16" if device == "cuda" else "float32"
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=chosen == "bfloat16")

    def preprocess(self, part: dict[str, Tensor]) -> Tensor:
        """What the model sees, float32 (B, 3, S, S): jittered, where that was drawn, and normalised."""
        pixels = part["pixels"].to(torch.float32, memory_format=torch.contiguous_format)
        if "jitter_factors" in part:
            jitter(pixels, part["jitter_factors"], part["jitter_order"])
        return self.normalise(pixels)

    def forward(self, part: dict[str, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy over the predicted tokens, which were guessed right: bool (B, P)) of a part of a batch.

        `part` is what `data.LoadBatch` gives.
        """
        pixels = self.preprocess(part)
        targets = part["tokens"][:, layout.visible :][:, layout.ranks]
        with self.autocast:
            scale = drop_path_scales(part["uniform_draws"], self.settings.model.drop_path)
            rows = self.model.predict_rows(pixels, part["order"], layout, scale)
            return token_loss(
                rows, self.model.decoder, targets, self.settings.execution.loss_chunk, self.loss_and_grads
            )


def _adamw(model: MaPeT, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Weight decay on matrices only: not on biases, norms, LayerScale, positions and class token."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, fused=True)
