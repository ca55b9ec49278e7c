"""Opening a run: new, or restored from its newest checkpoint."""

from pathlib import Path
from typing import Any

import msgspec
from omegaconf import OmegaConf

from ...shared.runtime.console import say
from ...shared.runtime.devices import peak_flops
from ...shared.runtime.distributed import World
from ...shared.storage.files import written_whole
from ..training.plan import Plan, make_plan
from ..training.step_metrics import StepMetrics
from ..training.task import BatchT, Task
from ..training.trainer import Trainer
from ..weights.checkpoint import EMA, MODEL, OPTIMIZER, Checkpoints, load_tensors
from .jsonl import drop_lines_after, logs
from .metric_writers import open_writers
from .metrics import Logbook
from .record import write_record
from .resume import ResumePoint, refuse_other_images, refuse_other_start
from .run import Run


def open_run(
    task: Task[BatchT],
    out: Path,
    point: ResumePoint | None,
    init: str | Path | None,
    device: str,
    world: World,
) -> Run[BatchT]:
    """The run of a task in the folder `out`: new, started from the weights `init` if given, or resumed at `point`.

    The caller has held the lock of `out` (`sole_writer`) since before it looked for `point`. Raises UsageError for
    settings that do not fit together or other weights than the run was started from, DataError for other images.
    """
    if point is not None:
        resumed = point
        world.all_or_raise(lambda: refuse_other_images(resumed, task.images))
        world.all_or_raise(lambda: refuse_other_start(resumed, init))
    extensions = () if point is None else point.extensions
    plan = world.all_or_raise(
        lambda: make_plan(task.settings, len(task.images), world.size, task.computed_together, extensions)
    )
    evaluator = world.all_or_raise(lambda: task.evaluator(device) if world.is_first else None)
    trainer, source = _open_trainer(task, plan, point, init, device, world)
    start = 0 if point is None else int(point.metadata["step"])
    world.on_rank_zero(lambda: _begin_folder(task, out, plan, start, source, world))
    train = task.settings.train
    run = Run(
        task=task,
        out=out,
        world=world,
        device=device,
        plan=plan,
        trainer=trainer,
        start=start,
        init=source,
        checkpoints=Checkpoints(out, train.keep_last, train.keep_every),
        logbook=_open_logbook(task, out, plan, point, device, world),
        evaluator=evaluator,
    )
    world.wait()
    return run


def _open_trainer(
    task: Task[BatchT], plan: Plan, point: ResumePoint | None, init: str | Path | None, device: str, world: World
) -> tuple[Trainer[BatchT], dict[str, str] | None]:
    """The trainer, restored or with starting weights, and what the run was started from."""
    model = task.new_model()
    if point is None:
        source = None if init is None else world.all_or_raise(lambda: task.start_from(model, init))
        return world.all_or_raise(lambda: Trainer(task, model, plan, world, device)), source
    trainer = world.all_or_raise(lambda: Trainer(task, model, plan, world, device))
    names = [MODEL, OPTIMIZER, *([EMA] if task.settings.train.ema is not None else [])]
    trainer.restore({name: load_tensors(point.path, name) for name in names}, point.metadata["loss_watch"])
    _say_where(point, plan)
    return trainer, point.metadata["init"]


def _say_where(point: ResumePoint, plan: Plan) -> None:
    step, schedule = int(point.metadata["step"]), plan.schedule
    if plan.extensions and step == schedule.start:
        say(
            f"Extending {point.path} to {plan.epochs} epochs (step {step} to {plan.steps}): learning rate from "
            f"{schedule.warmup_lr:g} to {schedule.lr:g} in {schedule.warmup} steps, then a cosine to "
            f"{schedule.min_lr:g}."
        )
    else:
        say(f"Resuming from {point.path} (step {step} of {plan.steps}).")


def _begin_folder(
    task: Task[BatchT], out: Path, plan: Plan, start: int, source: dict[str, str] | None, world: World
) -> None:
    """Writes settings.yaml and run.json, and drops what was logged after step `start`."""
    out.mkdir(parents=True, exist_ok=True)
    with written_whole(out / "settings.yaml") as partial:
        OmegaConf.save(OmegaConf.structured(task.settings), partial)
    metadata: dict[str, Any] = {
        "task": task.name,
        "images": len(task.images),
        "keys_sha256": task.images.keys_sha256,
        **task.run_metadata(),
        "init": source,
        "extensions": msgspec.to_builtins(plan.extensions),
        "processes": world.size,
    }
    write_record(out, start, metadata)
    for path in (*logs(out / "keys", "*.jsonl"), *logs(out, "bad-steps.jsonl"), *logs(out, "probe.jsonl")):
        drop_lines_after(path, start)


def _open_logbook(
    task: Task[BatchT], out: Path, plan: Plan, point: ResumePoint | None, device: str, world: World
) -> Logbook:
    train, start = task.settings.train, 0 if point is None else int(point.metadata["step"])
    peak = peak_flops(device)
    writers = open_writers(out, start, train.wandb, task.settings.to_json()) if world.is_first else []
    return Logbook(
        out / "metrics.jsonl" if world.is_first else None,
        start,
        [] if point is None else [StepMetrics(**metrics) for metrics in point.metadata["pending"]],
        every=train.log_every,
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
        bands=task.bands.name,
        measure=task.bands.measure,
        peak_images_per_second=peak and world.size * peak / task.flops_per_image(),
        writers=writers,
    )
