"""The training loop: steps, metrics, checkpoints, evaluations, and an orderly stop."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from ...shared.errors import DataError, Interrupted, MapetError
from ...shared.runtime.console import in_command, progress, say, stop_signals
from ...shared.runtime.devices import choose_workers
from ...shared.runtime.distributed import AsyncFlag, World
from ...shared.runtime.memory import as_text
from ..data.batch_order import global_batches
from ..data.remote_tars import fetched_tars
from ..training.bad_steps import BadStep
from ..training.dry_run import RunEstimate, estimate_run, measure_steps
from ..training.plan import Plan, make_plan
from ..training.step_metrics import StepMetrics
from ..training.task import BatchT, Places, Task
from ..training.trainer import Trainer
from .run import Run


def train(run: Run[BatchT]) -> Path:
    """Trains to the last step and returns the folder of the last checkpoint.

    Raises Interrupted after Ctrl-C, SIGTERM or another of the `stop_signals`, with a checkpoint written, and DataError
    for a bad step, unless such steps are skipped.
    """
    settings, plan = run.task.settings, run.plan
    loader = load_parts(run.task, plan, run.world, run.device, run.start)
    stop_flag, parent = AsyncFlag(run.world), os.getppid()
    with (
        _checkpoint_finished(run),
        _stop_requested() as requested,
        fetched_tars(run.task.images, settings, run.start, plan.epochs) as passed,
        progress("training", plan.steps, "steps", run.start) as advance,
    ):
        for step in range(run.start, plan.steps):
            parts, waited = _next_parts(loader, plan)
            metrics = _step(run, step, parts)
            passed(step + 1)
            try:
                advance(1, run.logbook.log(step + 1, metrics, waited))
                is_last = step + 1 == plan.steps
                # Processes whose torchrun was killed would go on beside those that another torchrun starts.
                is_orphaned = run.world.size > 1 and os.getppid() != parent
                stops = stop_flag.ask(requested.is_set() or is_orphaned) and not is_last
                if is_last or stops or (step + 1) % settings.train.checkpoint_every == 0:
                    run.save(step + 1)
            except BadStep as bad:
                _fail(run, bad)
            if run.is_evaluated(step + 1):
                run.evaluate(step + 1)
            if stops:
                _stop(run, step + 1)
    checkpoint = run.world.on_rank_zero(run.checkpoints.finish)
    assert checkpoint is not None  # the last step writes one
    return checkpoint


@contextmanager
def _checkpoint_finished(run: Run[BatchT]) -> Iterator[None]:
    """If the block fails, the checkpoint that is being written is finished before the run is left to others."""
    try:
        yield
    except BaseException:
        with suppress(MapetError):  # a second failure must not hide the first
            run.checkpoints.finish()
        raise


def dry_run(task: Task[BatchT], world: World, device: str) -> RunEstimate:
    """The estimate of a run of `task`, with measured steps if its memory suffices for them. Nothing is written.

    Raises UsageError for settings that do not fit together, DataError for images that cannot be read.
    """
    settings = task.settings
    plan = world.all_or_raise(lambda: make_plan(settings, len(task.images), world.size, task.computed_together))
    estimate = estimate_run(task, plan, world, device)
    if estimate.memory.device > estimate.free_memory:
        say(
            f"No steps were measured: about {as_text(estimate.memory.device)} are needed and "
            f"{as_text(estimate.free_memory)} are free. Lower execution.micro_batch, or set "
            "execution.grad_checkpointing=true."
        )
        return estimate
    trainer = Trainer(task, task.new_model(), plan, world, device)
    with fetched_tars(task.images, settings, 0):
        return replace(estimate, steps=measure_steps(trainer, load_parts(task, plan, world, device, 0)))


def load_parts(task: Task[BatchT], plan: Plan, world: World, device: str, start: int) -> Iterator[BatchT]:
    """Yields each part of this process's share of each batch, from step `start` on."""

    def places() -> Iterator[Places]:
        for epoch, batch in global_batches(task.images, task.settings, start, plan.epochs):
            for part in np.split(np.split(batch, world.size)[world.rank], plan.parts):
                yield [(epoch, index) for index in part.tolist()]

    workers = choose_workers(task.settings.data.workers, device)
    return task.batches(places(), workers, pin_memory=device == "cuda")


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """Yields an event that, in a command, Ctrl-C, SIGTERM and the other `stop_signals` set, so that a step is never
    interrupted half-way."""
    stop = threading.Event()
    if not in_command() or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in stop_signals()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _next_parts(loader: Iterator[BatchT], plan: Plan) -> tuple[list[BatchT], float]:
    """The parts of this process's share of the next batch, and the seconds spent waiting for them."""
    began = time.perf_counter()
    parts = [next(loader) for _ in range(plan.parts)]
    return parts, time.perf_counter() - began


def _step(run: Run[BatchT], step: int, parts: list[BatchT]) -> StepMetrics:
    if run.task.settings.train.log_keys:
        # Before the step, in which processes wait for each other: the keys of every step in a checkpoint are logged.
        run.log_keys(step + 1, [run.task.images.key(int(index)) for part in parts for index in part.index])
    try:
        metrics = run.trainer.step(step, parts)
    except BadStep as bad:
        _fail(run, bad)
    if metrics.problem is not None:
        run.list_bad_step(step + 1, metrics.problem)
    return metrics


def _fail(run: Run[BatchT], bad: BadStep) -> NoReturn:
    run.list_bad_step(bad.step, bad.problem)
    run.world.raise_on_rank_zero(
        DataError(
            f"Step {bad.step} has {bad.problem}; its images are listed in {run.out / 'bad-steps.jsonl'}. Lower "
            "optimizer.lr, set train.precision=float32, or leave such steps out with --set train.on_bad_step=skip."
        )
    )


def _stop(run: Run[BatchT], step: int) -> NoReturn:
    path = run.world.on_rank_zero(run.checkpoints.finish)
    run.world.raise_on_rank_zero(
        Interrupted(
            f"Stopped after step {step} of {run.plan.steps}; {path} is written. Give the same command to resume."
        )
    )
