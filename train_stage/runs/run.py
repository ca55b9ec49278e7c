"""A run: its task, its trainer, and everything that is written into its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import msgspec

from ...shared.runtime.distributed import World
from ..data.batch_order import global_batches
from ..training.plan import Plan
from ..training.task import BatchT, RunEvaluator, Task
from ..training.trainer import Trainer
from ..weights.checkpoint import Checkpoints
from .jsonl import append_line
from .metrics import Logbook
from .record import refuse_deleted


@dataclass(frozen=True, eq=False)
class Run(Generic[BatchT]):
    """A run that is ready to train from step `start` on."""

    task: Task[BatchT]
    out: Path
    world: World
    device: str
    plan: Plan
    trainer: Trainer[BatchT]
    start: int
    init: dict[str, str] | None
    """The "file" and "sha256" of the weights that the run started from; None for fresh weights."""
    checkpoints: Checkpoints
    logbook: Logbook
    evaluator: RunEvaluator | None
    """In the first process, if the settings ask for it."""

    def save(self, step: int) -> None:
        """Starts writing a checkpoint; training continues meanwhile.

        Raises BadStep if a pending loss is not finite, and DataError if the run's folder was deleted.
        """
        pending, tensors = self.logbook.pending(step), self.trainer.tensors()
        if self.world.is_first:
            refuse_deleted(self.out)
            self.checkpoints.save(step, tensors, self._metadata(pending))

    def _metadata(self, pending: list[dict[str, Any]]) -> dict[str, Any]:
        """The metadata of a checkpoint; `pending` are the metrics since the last line of metrics.jsonl."""
        settings = self.task.settings
        return {
            **self.task.checkpoint_metadata(),
            "task": self.task.name,
            "seed": settings.train.seed,
            "settings": settings.to_json(),
            "images": len(self.task.images),
            "keys_sha256": self.task.images.keys_sha256,
            "init": self.init,
            "extensions": msgspec.to_builtins(self.plan.extensions),
            "loss_watch": self.trainer.monitor.to_json(),
            "pending": pending,
        }

    def log_keys(self, step: int, keys: list[str]) -> None:
        """Adds the images that this process sees in a step to RUN/keys/."""
        append_line(self.out / "keys" / f"process-{self.world.rank}.jsonl", {"step": step, "keys": keys})

    def list_bad_step(self, step: int, problem: str) -> None:
        """Adds a step and the images of its global batch to RUN/bad-steps.jsonl."""
        if self.world.is_first:
            order = global_batches(self.task.images, self.task.settings, step - 1, self.plan.epochs)
            _, batch = next(order)
            keys = [self.task.images.key(index) for index in batch.tolist()]
            append_line(self.out / "bad-steps.jsonl", {"step": step, "problem": problem, "keys": keys})

    def is_evaluated(self, step: int) -> bool:
        """Whether the weights are evaluated after `step` steps."""
        every = self.task.evaluation_interval(self.plan.steps_per_epoch)
        return every is not None and (step % every == 0 or step == self.plan.steps)

    def evaluate(self, step: int) -> None:
        """Evaluates the current weights and adds the numbers to RUN/probe.jsonl."""
        weights = self.trainer.weights()
        if self.evaluator is not None:
            numbers = self.evaluator.measure(weights)
            append_line(self.out / "probe.jsonl", {"step": step, **numbers})
            self.logbook.log_evaluation(step, numbers)
        self.world.wait()  # the first process may take longer than a collective may
