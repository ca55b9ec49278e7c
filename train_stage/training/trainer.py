"""The trainer: model, optimizer, schedule and moving average of a task, and what a step does to them."""

from collections.abc import Iterable
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ...shared.errors import DataError, UsageError
from ...shared.runtime.devices import refuse_missing_compiler
from ...shared.runtime.distributed import World
from ..settings import FLEX, ExecutionSettings
from ..weights.checkpoint import EMA, MODEL, OPTIMIZER, Tensors
from .bad_steps import BadStep, LossMonitor
from .parallel import (
    fill,
    fill_optimizer,
    full_tensor,
    gradient_sync,
    optimizer_tensors,
    refuse_other_tensors,
    wrap_parallel,
)
from .plan import Plan
from .step_metrics import StepMetrics
from .task import BatchT, TaskModel

_MOST_BAD_STEPS = 100


class Trainer(Generic[BatchT]):
    """Everything that changes from step to step. Training starts from the weights that `model` has."""

    def __init__(self, task: TaskModel[BatchT], model: nn.Module, plan: Plan, world: World, device: str) -> None:
        """Moves `model` to the device, shards or replicates it over the processes, and makes the optimizer.

        Raises UsageError if compilation is asked for and the machine has no compiler, and for FlexAttention on the CPU.
        """
        self.task, self.settings, self.plan, self.world, self.device = task, task.settings, plan, world, device
        self.model = model.to(device).train()
        self.loss = task.loss(model, device, task.settings.train.precision_on(device))
        execution = self.settings.execution
        _refuse_flex_attention(execution, device)
        blocks = task.blocks(model)
        if execution.compile:
            refuse_missing_compiler("execution.compile=true")
            for block in blocks:
                block.compile()
            self.loss.compile_surroundings()
        self._parallel_loss = wrap_parallel(self.loss, blocks, execution.parallel, world, device)
        self.optimizer = self._adamw()
        self.ema: dict[str, Tensor] = {}
        if self.settings.train.ema is not None:
            self.ema = {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}
        self.monitor = LossMonitor(self.settings.train.spike)

    def step(self, step: int, parts: Iterable[BatchT]) -> StepMetrics:
        """One optimizer step on this process's share of a global batch, in `plan.parts` parts of equal size.

        Raises DataError after a hundred consecutive bad steps, if bad steps are skipped.
        """
        self._set_learning_rate(self.plan.schedule.lr_at(step))
        inputs, count = self.loss.at_step(step, self.plan.steps_as_begun), self.plan.parts
        sums = torch.zeros(1 + self.task.bands.count, device=self.device)
        for index, part in enumerate(parts):
            with gradient_sync(self._parallel_loss, now=index == count - 1):
                loss, right = self._parallel_loss(part.to(self.device), inputs)
                (loss / count).backward()
            sums += torch.cat([loss.detach()[None] / count, right])
        if self.world.size > 1:
            torch.distributed.all_reduce(sums)
        loss, right = sums[0] / self.world.size, sums[1:]
        limit = self.settings.optimizer.clip_grad
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit or float("inf")))
        problem = self._reason_to_skip(step, loss, norm)
        if problem is None:
            self.optimizer.step()
            self._update_ema(step)
        self.optimizer.zero_grad(set_to_none=True)
        lr, images = max(group["lr"] for group in self.optimizer.param_groups), self.settings.train.batch_size
        guesses = [images * count for count in inputs.predictions]
        return StepMetrics(loss, right, guesses, norm, images, lr, problem)

    def _update_ema(self, step: int) -> None:
        """Moves the average towards the weights. The decay warms up as in timm (`ModelEmaV3`, power 2/3)."""
        train = self.settings.train
        if train.ema is None:
            return
        decay = min(train.ema, 1 - (step + 1) ** (-2 / 3)) if train.ema_warmup else train.ema
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update(list(self.ema.values()), [parameter.detach() for parameter in self.model.parameters()], None)

    def _set_learning_rate(self, lr: float) -> None:
        """Sets the learning rate of each group of parameters: `lr` times the group's scale."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _reason_to_skip(self, step: int, loss: Tensor, norm: Tensor) -> str | None:
        """Why the update of this step is skipped, or None. All processes have the same loss and norm, so they agree."""
        train = self.settings.train
        if train.on_bad_step == "stop" and train.spike is None:
            return None  # no need to wait for the loss: the logbook finds the NaN before anything is written
        problem = self.monitor.problem(loss.item(), norm.item())
        if problem and train.on_bad_step == "stop":
            raise BadStep(step + 1, problem)
        if self.monitor.in_a_row >= _MOST_BAD_STEPS:
            raise DataError(
                f"{self.monitor.in_a_row} steps in a row were bad, the last one with {problem}; lower optimizer.lr, or "
                "set train.precision=float32."
            )
        return problem

    def weights(self) -> dict[str, Tensor]:
        """The unsharded weights to use: their moving average, if there is one. Every process must call this."""
        return {name: full_tensor(tensor) for name, tensor in (self.ema or self.model.state_dict()).items()}

    def tensors(self) -> Tensors:
        """The unsharded tensors of a checkpoint. Every process must call this."""
        content = {MODEL: self.model.state_dict(), OPTIMIZER: optimizer_tensors(self.model, self.optimizer)}
        if self.ema:
            content[EMA] = self.ema
        return {
            name: {key: full_tensor(tensor) for key, tensor in tensors.items()} for name, tensors in content.items()
        }

    def restore(self, tensors: Tensors, monitor: dict[str, Any]) -> None:
        """Restores what `tensors` and `LossMonitor.to_json` gave, before the first step."""
        parameters = dict(self.model.named_parameters())
        refuse_other_tensors(MODEL, self.model.state_dict(), tensors[MODEL])
        refuse_other_tensors(EMA, self.ema, tensors[EMA] if self.ema else {})
        refuse_other_tensors(OPTIMIZER, parameters, tensors[OPTIMIZER], slots=True)
        for target, name in ((parameters, MODEL), (self.ema, EMA)):
            for key in target:
                fill(target[key], tensors[name][key])
        fill_optimizer(self.model, self.optimizer, tensors[OPTIMIZER])
        self.monitor.restore(monitor)

    def _adamw(self) -> torch.optim.AdamW:
        """AdamW over the parameters that are trained, in groups of one weight decay and one scale of the learning rate,
        "lr_scale"."""
        settings, task = self.settings.optimizer, self.task
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        for name, parameter in trained:
            group = (task.without_weight_decay(name, parameter), task.lr_scale(name))
            groups.setdefault(group, []).append(parameter)
        beta1, beta2 = settings.betas
        return torch.optim.AdamW(
            [
                {
                    "params": groups[exempt, scale],
                    "weight_decay": 0.0 if exempt else settings.weight_decay,
                    "lr_scale": scale,
                }
                for exempt, scale in sorted(groups)
            ],
            lr=self.plan.schedule.lr,
            betas=(beta1, beta2),
            eps=settings.eps,
            fused=True,
        )


def _refuse_flex_attention(execution: ExecutionSettings, device: str) -> None:
    """Raises UsageError if execution.attention=flex cannot be trained with here."""
    if execution.attention != FLEX:
        return
    if device == "cpu":
        raise UsageError("execution.attention=flex has no backward pass on the CPU; leave it out, or train on a GPU.")
    refuse_missing_compiler("execution.attention=flex")
