"""The estimate of a dry run: what a run amounts to, how much memory and time it will take. Nothing is written."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch

from ...shared.runtime.compat import LiveBytes, fake_tensors
from ...shared.runtime.console import results, table
from ...shared.runtime.distributed import World
from ...shared.runtime.memory import as_text, free_bytes
from .plan import Plan
from .task import BatchT, TaskModel
from .trainer import Trainer

WARM_UP, MEASURED = 2, 10
# What a process holds besides its tensors, measured on the CPU (glibc 2.36); not measured on a GPU. Mapped kernels and
# what libraries allocate at first use: about 40 MiB. Heap fragmentation: without these 40 MiB, resident memory was 1.1
# to 1.4 times the tensors of a step, most with gradient checkpointing (1.7 times with 64 images at once), whether or
# not `keep_freed_memory` is called. The tensors themselves are estimated to 1 %.
_LIBRARIES, _FRAGMENTATION = 40 << 20, 1.2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of one process."""

    device: int
    """On the device that computes; on the CPU without what imports need."""
    checkpoint_copies: int
    """Host memory of the first process that checkpoints are written from; on the CPU contained in `device`."""


@dataclass(frozen=True)
class MeasuredSteps:
    """Seconds of measured steps."""

    count: int
    mean: float
    shortest: float
    longest: float


@dataclass(frozen=True)
class RunEstimate:
    """What a run amounts to."""

    plan: Plan
    batch_size: int
    epochs: int
    processes: int
    on_gpu: bool
    description: list[tuple[str, str]]
    """The model and what it computes (`TaskModel.describe`)."""
    flops_per_image: int
    learning_rates: tuple[float, float, float]
    """At the start of the warm-up, at its end, and at the end of the cosine."""
    memory: MemoryEstimate
    free_memory: int
    """Bytes that are free on the device now."""
    steps: MeasuredSteps | None
    """None if the memory does not suffice to measure any."""

    @property
    def seconds(self) -> float | None:
        """Of all steps; None if none was measured."""
        return None if self.steps is None else self.steps.mean * self.plan.steps


def estimate_run(task: TaskModel[BatchT], plan: Plan, world: World, device: str) -> RunEstimate:
    """The estimate of a run without measured steps."""
    schedule, train = plan.schedule, task.settings.train
    return RunEstimate(
        plan=plan,
        batch_size=train.batch_size,
        epochs=train.epochs,
        processes=world.size,
        on_gpu=device == "cuda",
        description=task.describe(plan.steps),
        flops_per_image=task.flops_per_image(),
        learning_rates=(schedule.warmup_lr, schedule.lr, schedule.min_lr),
        memory=estimate_memory(task, plan, world, device),
        free_memory=torch.cuda.mem_get_info()[0] if device == "cuda" else free_bytes(),
        steps=None,
    )


def estimate_memory(task: TaskModel[BatchT], plan: Plan, world: World, device: str) -> MemoryEstimate:
    """The memory of one process at its peak: all tensors of a step, traced without content, and what comes on top.

    On the CPU the copies that checkpoints are written from lie there as well; beside a GPU they lie in host memory.
    """
    settings = task.settings
    copies_of_weights = 1 + (settings.train.ema is not None)
    weights = _bytes_of_weights(task)
    shards = world.size if settings.execution.parallel == "fsdp" else 1
    tensors = _peak_of_step(task, plan, device)
    # Each process keeps its shard of weights, gradients, two moments and the average.
    tensors -= (3 + copies_of_weights) * weights * (shards - 1) // shards
    peak, copies = round(_FRAGMENTATION * tensors), (2 + copies_of_weights) * weights
    if device == "cpu" and world.is_first:
        # Copies are kept from one checkpoint to the next, so that steps come on top of them; the copies of the last
        # checkpoint reuse the memory of a step's tensors.
        peak = peak + copies if settings.train.checkpoint_every < plan.steps else max(peak, copies // shards + copies)
    return MemoryEstimate(peak + _LIBRARIES, copies)


def _bytes_of_weights(task: TaskModel[BatchT]) -> int:
    with torch.device("meta"):
        return 4 * sum(parameter.numel() for parameter in task.new_model().parameters())


def _peak_of_step(task: TaskModel[BatchT], plan: Plan, device: str) -> int:
    """Bytes of all tensors that are alive at the peak of a step on the CPU, in the precision of `device`."""
    settings = task.settings
    with torch.device("meta"):
        model = task.new_model().train()
        loss = task.loss(model, "cpu", settings.train.precision_on(device))
    # Outside the fake mode, as the values of masks are needed. What is predicted may change in the course of a run.
    first, last = (loss.at_step(step, plan.steps) for step in (0, plan.steps - 1))
    distinct = [first] if first.predictions == last.predictions else [first, last]
    live = LiveBytes()
    with fake_tensors(), live:
        model.to_empty(device="cpu")
        loss = task.loss(model, "cpu", settings.train.precision_on(device))
        batch = task.example_batch(plan.micro_batch)
        copies = 2 + (settings.train.ema is not None)
        kept = [[torch.empty_like(p) for p in model.parameters()] for _ in range(copies)]
        for inputs in distinct:
            for _ in range(min(plan.parts, 2)):  # from the second part on there are gradients
                loss(batch, inputs)[0].backward()
            model.zero_grad(set_to_none=True)
        del kept
    return live.peak


def measure_steps(trainer: Trainer[BatchT], loader: Iterator[BatchT]) -> MeasuredSteps:
    """Takes up to twelve steps and times all but the first two."""
    plan, seconds = trainer.plan, []
    for step in range(min(WARM_UP + MEASURED, plan.steps)):
        began = time.perf_counter()
        trainer.step(step, [next(loader) for _ in range(plan.parts)])
        if trainer.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    timed = seconds[WARM_UP:] or seconds
    return MeasuredSteps(len(timed), statistics.mean(timed), min(timed), max(timed))


def show_estimate(estimate: RunEstimate, *, as_json: bool = False) -> None:
    """Prints the plan, the memory, and the time if steps were measured: as tables, or as one JSON object."""
    if as_json:
        results.print_json({**asdict(estimate), "seconds": estimate.seconds})
        return
    plan, flops = estimate.plan, estimate.flops_per_image
    start, peak, end = estimate.learning_rates
    split = f"{estimate.processes} process(es) x {plan.parts} part(s) x {plan.micro_batch} images"
    where = "on the GPU" if estimate.on_gpu else "besides Python's and PyTorch's own"
    copies = as_text(estimate.memory.checkpoint_copies)
    table(
        "Plan of the run (nothing was written)",
        [
            *estimate.description,
            ("FLOPs", f"{flops / 1e9:,.2f} G per image, {flops * estimate.batch_size / 1e12:,.2f} T per step"),
            ("images", f"{plan.images:,}; {plan.steps_per_epoch * estimate.batch_size:,} per epoch"),
            ("batch", f"{estimate.batch_size} = {split}"),
            ("steps", f"{plan.steps:,} = {estimate.epochs} epochs x {plan.steps_per_epoch:,}"),
            ("warm-up", f"{plan.schedule.warmup:,} steps from {start:g} to {peak:g}"),
            ("then", f"{plan.steps - plan.schedule.warmup:,} steps along a cosine to {end:g}"),
            ("memory, estimated", f"{as_text(estimate.memory.device)} per process, {where}"),
            *([("host memory", f"{copies} for checkpoints, first process")] if estimate.on_gpu else []),
        ],
    )
    steps = estimate.steps
    if steps is None or estimate.seconds is None:
        return
    duration = timedelta(seconds=round(estimate.seconds))
    table(
        f"Measured in {steps.count} steps",
        [
            ("a step", f"{steps.mean:.3f} s, {estimate.batch_size / steps.mean:,.1f} images/s"),
            ("shortest, longest", f"{steps.shortest:.3f} s, {steps.longest:.3f} s"),
            ("all steps", f"{duration} (h:mm:ss) on {estimate.processes} such process(es)"),
        ],
    )
