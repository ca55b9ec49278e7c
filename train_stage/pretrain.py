"""pretrain: images and their stored tokens -> a pre-trained MaPeT. No teacher, no masks in the loader."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
from torch import Tensor

from ..shared.errors import DataError, Interrupted
from ..shared.runtime.console import progress, say, table
from ..shared.runtime.devices import choose_device, choose_workers
from ..shared.runtime.distributed import AsyncFlag, World, joined_world
from ..shared.runtime.loader import batches
from ..shared.storage.files import WriteLock
from ..shared.tokens.store import TokenStore
from .data.batch import LoadBatch, check_grid
from .data.batch_order import global_batches
from .data.dataset import TokenisedImages
from .data.remote_tars import tars_at_hand
from .runs.metrics import Logbook
from .runs.run import Run, join_images, open_run
from .settings import Settings, resolve
from .training.bad_steps import BadStep
from .training.dry_run import measure, show_plan
from .training.parallel import peers_explained
from .training.plan import Plan, make_plan
from .training.step_metrics import StepMetrics
from .training.trainer import Trainer


def pretrain(
    images: str | Path | Sequence[str | Path] | None,
    tokens: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    objective: str | None = None,
    init: str | Path | None = None,
    resume: str = "auto",
    dry_run: bool = False,
    device: str = "auto",
) -> Path | None:
    """Pre-trains MaPeT (arXiv 2306.07346) and returns the folder of the last checkpoint.

    Under torchrun all processes work on one run; the batches, and what is in them, do not depend on how many they are.

    Args:
        images: a tar, a folder, a brace pattern of tars, or a list of tars; None if the token store holds the images.
        tokens: the token store of these images.
        out: the run's folder: settings.yaml, run.json, metrics.jsonl, TensorBoard events, checkpoints/.
        recipe: a shipped recipe's name or a YAML file; overrides: "key=value" settings (see `settings.Settings`).
        objective: "mapet", "pim" or "mim"; the same as the setting objective.name.
        init: weights to start from (a run, a checkpoint, an import, an export or a published `.pth.tar`); positions
            are resampled to the model's grid, and what the weights lack or have for another K starts fresh.
        resume: "auto" goes on from the newest whole checkpoint in `out`, if there is one; "never" refuses if there is.
        dry_run: print the resolved plan, memory and time (from ten measured steps); write nothing and return None.
        device: "auto", "cpu" or "cuda".

    Raises:
        UsageError for settings that cannot be or that differ from those of the run to go on with, DataError for
        images or tokens that are missing or damaged, or a loss that is no number, FingerprintMismatch for tokens of
        another codebook than before, Interrupted after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    chosen = [] if objective is None else [f"objective.name={objective}"]
    settings = resolve(recipe, [*overrides, *chosen])
    device = choose_device(device)
    with joined_world(device) as world, peers_explained(world):
        if dry_run:
            _dry_run(images, TokenStore(tokens), settings, device, world)
            return None
        lock = WriteLock(Path(out))
        try:
            run = open_run(images, tokens, Path(out), settings, init, resume, device, world, lock)
            with run.logbook as logbook:
                path = _train(run, logbook)
            _summary(run, path)
        finally:
            lock.release()
    return path


@contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C or SIGTERM sets, so that a step is never cut in two."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _load(
    settings: Settings, plan: Plan, data: TokenisedImages, world: World, device: str, start: int
) -> Iterator[dict[str, Tensor]]:
    """Yields each part of this process's share of each batch, from step `start` on."""

    def my_parts() -> Iterator[list[tuple[int, int]]]:
        for epoch, batch in global_batches(data, settings, start):
            for part in np.split(np.split(batch, world.size)[world.rank], plan.parts):
                yield [(epoch, index) for index in part.tolist()]

    workers = choose_workers(settings.data.workers, device)
    return batches(LoadBatch(data, settings), my_parts(), workers, pin_memory=device == "cuda")


def _dry_run(
    images: str | Path | Sequence[str | Path] | None, store: TokenStore, settings: Settings, device: str, world: World
) -> None:
    check_grid(store, settings.model)
    data = join_images(images, store, settings, world)
    plan = world.all_or_raise(lambda: make_plan(settings, len(data), world.size))
    memory = show_plan(settings, store.k, plan, world, device)
    trainer = Trainer(settings, store.k, plan, world, device)
    with tars_at_hand(data, settings, 0):
        measure(trainer, _load(settings, plan, data, world, device, 0), memory)
    say("Dry run: nothing was written.")


def _train(run: Run, logbook: Logbook) -> Path:
    settings, plan = run.settings, run.plan
    loader = _load(settings, plan, run.data, run.world, run.device, run.start)
    stop_flag, parent = AsyncFlag(run.world), os.getppid()
    with (
        _stop_asked() as asked,
        tars_at_hand(run.data, settings, run.start) as passed,
        progress("pre-training", plan.steps, "steps", run.start) as advance,
    ):
        for step in range(run.start, plan.steps):
            parts, waited = _next(loader, plan)
            metrics = _step(run, step, parts)
            passed(step + 1)
            try:
                note = logbook.note(step + 1, metrics, waited)
                advance(1, note)
                done = step + 1 == plan.steps
                # Processes whose torchrun was killed would train on beside those that another one starts.
                orphaned = run.world.size > 1 and os.getppid() != parent
                stop = stop_flag.ask(asked.is_set() or orphaned) and not done
                if done or stop or (step + 1) % settings.train.checkpoint_every == 0:
                    run.save(step + 1)
            except BadStep as bad:
                _give_up(run, bad)
            if _is_probed(run, step + 1):
                run.probe_now(step + 1)
            if stop:
                _stop(run, step + 1)
    return run.world.on_rank_zero(run.checkpoints.finish)


def _next(loader: Iterator[dict[str, Tensor]], plan: Plan) -> tuple[list[dict[str, Tensor]], float]:
    """The parts of this process's share of the next batch, and the seconds it took until they were there."""
    began = time.perf_counter()
    parts = [next(loader) for _ in range(plan.parts)]
    return parts, time.perf_counter() - began


def _step(run: Run, step: int, parts: list[dict[str, Tensor]]) -> StepMetrics:
    if run.settings.train.log_keys:
        # Before the step, in which processes wait for each other: no checkpoint has a step whose keys are not written.
        run.log_keys(step + 1, [run.data.key(int(index)) for part in parts for index in part["index"]])
    try:
        metrics = run.trainer.step(step, parts)
    except BadStep as bad:
        _give_up(run, bad)
    if metrics.problem is not None:
        run.list_bad_step(step + 1, metrics.problem)
    return metrics


def _give_up(run: Run, bad: BadStep) -> NoReturn:
    run.list_bad_step(bad.step, bad.problem)
    run.world.raise_on_rank_zero(
        DataError(
            f"Step {bad.step} has {bad.problem}; its images are listed in {run.out / 'bad-steps.jsonl'}. Lower "
            "optimizer.lr, set train.precision=float32, or leave such steps out with --set train.on_bad_step=skip."
        )
    )


def _stop(run: Run, step: int) -> NoReturn:
    path = run.world.on_rank_zero(run.checkpoints.finish)
    run.world.raise_on_rank_zero(
        Interrupted(
            f"Stopped after step {step} of {run.plan.steps}; {path} is written. Give the same command to go on."
        )
    )


def _is_probed(run: Run, step: int) -> bool:
    probe = run.settings.probe
    return probe.images is not None and (step % probe.every == 0 or step == run.plan.steps)


def _summary(run: Run, path: Path) -> None:
    if not run.world.is_first:
        return
    logbook = run.logbook
    done = [line for line in logbook.lines if line["loss"] is not None]
    rows = [
        ("images", f"{len(run.data):,}, {run.settings.train.epochs} epochs, {run.plan.steps:,} steps"),
        ("parameters", f"{sum(p.numel() for p in run.trainer.model.parameters()):,}"),
    ]
    if done:
        first, last = done[0], done[-1]
        losses = f"{first['loss']:.3f} (steps to {first['step']}) -> {last['loss']:.3f} (steps to {last['step']})"
        rows += [
            ("loss", losses),
            ("masked-token accuracy", f"{first['accuracy']:.2%} -> {last['accuracy']:.2%}"),
        ]
    skipped = sum(line["skipped_steps"] for line in logbook.lines)
    rows += [("steps skipped", str(skipped))] if skipped else []
    speed = f"{logbook.images_per_second:.1f}, {logbook.data_wait:.1%} of the time waiting for images"
    rows += [("images/s", speed if logbook.images else "nothing left to do"), ("checkpoint", str(path))]
    table("Pre-training", rows)
