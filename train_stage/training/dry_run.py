"""pretrain --dry-run: what a run amounts to, how much memory and time it will take; nothing is written."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta

import torch
from torch import Tensor

from ...shared.runtime.compat import LiveBytes, fake_tensors
from ...shared.runtime.console import say, table
from ...shared.runtime.distributed import World
from ...shared.runtime.memory import as_text, free_bytes
from ..model.mapet import MaPeT
from ..objectives.layouts import step_layout
from ..settings import Settings
from .plan import Plan, flops_per_image, parameters_of
from .trainer import PretrainingLoss, Trainer

WARM_UP, MEASURED = 2, 10
# What a process holds beside its tensors, measured on the CPU (glibc 2.36); not measured on a GPU. Kernels that are
# mapped and what libraries allocate at their first use: about 40 MiB. Holes in the heap, too small for the next tensor:
# without these 40 MiB, resident memory was 1.1 to 1.4 times a step's tensors, most with gradient checkpointing (1.7
# times with 64 images at once), whether or not `keep_freed_memory` is called. The tensors are foretold to 1 %.
_LIBRARIES, _HOLES = 40 << 20, 1.2


def show_plan(settings: Settings, k: int, plan: Plan, world: World, device: str) -> int:
    """Prints the resolved plan; returns the bytes that a process will hold on its device, imports aside."""
    shape, train, optimizer = settings.model.shape(k), settings.train, settings.optimizer
    layout = step_layout(settings.objective, shape.patches, train.seed, 0, plan.steps, "cpu")
    content = layout.content_rows
    flops = flops_per_image(settings, k)
    parameters = parameters_of(shape)
    memory, copies = estimate_memory(settings, k, plan, world, device), bytes_of_copies(settings, k)
    where = "on the GPU" if device == "cuda" else "beside Python's and PyTorch's own"
    queries = f" + {len(layout.ranks)} query rows" if layout.queries else ""
    split = f"{world.size} process(es) x {plan.parts} part(s) x {plan.micro_batch} images"
    table(
        "Plan of the run",
        [
            ("model", f"dim {shape.dim}, depth {shape.depth}, {shape.heads} heads, {parameters:,} parameters"),
            ("objective", f"{settings.objective.name}: {layout.visible} of {shape.patches} patches given"),
            ("rows an image", f"{content} content rows{queries}; {len(layout.ranks)} tokens predicted, K = {k}"),
            ("FLOPs", f"{flops / 1e9:,.2f} G an image, {flops * train.batch_size / 1e12:,.2f} T a step"),
            ("images", f"{plan.images:,}; {plan.steps_per_epoch * train.batch_size:,} an epoch"),
            ("batch", f"{train.batch_size} = {split}"),
            ("steps", f"{plan.steps:,} = {train.epochs} epochs x {plan.steps_per_epoch:,}"),
            ("warm-up", f"{plan.warmup:,} steps from {optimizer.warmup_lr:g} to {optimizer.lr:g}"),
            ("then", f"{plan.steps - plan.warmup:,} steps along a cosine to {optimizer.min_lr:g}"),
            ("memory, estimated", f"{as_text(memory)} a process, {where}"),
            *([("host memory", f"{as_text(copies)} for checkpoints, first process")] if device == "cuda" else []),
        ],
    )
    return memory


def estimate_memory(settings: Settings, k: int, plan: Plan, world: World, device: str) -> int:
    """Bytes that one process will hold at its peak on the device that computes, imports aside.

    All tensors of a step at their peak, from a step on tensors without content, plus what libraries and allocator hold.
    On the CPU the copies that checkpoints are written from are there as well; a GPU's are in the host's memory.
    """
    weights, shards = _bytes_of_weights(settings, k), world.size if settings.execution.parallel == "fsdp" else 1
    tensors = _peak_of_step(settings, k, plan, device)
    # Of weights, gradients, two moments and the average every process keeps its shard.
    tensors -= (4 + (settings.train.ema is not None)) * weights * (shards - 1) // shards
    peak = round(_HOLES * tensors)
    if device == "cpu" and world.is_first:
        copies = bytes_of_copies(settings, k)
        # Kept from one checkpoint to the next, so that steps come on top of them; the last one's are made where a
        # step's tensors were.
        peak = peak + copies if settings.train.checkpoint_every < plan.steps else max(peak, copies // shards + copies)
    return peak + _LIBRARIES


def bytes_of_copies(settings: Settings, k: int) -> int:
    """Bytes that checkpoints are written from, in the first process: weights, two moments and the average."""
    return (3 + (settings.train.ema is not None)) * _bytes_of_weights(settings, k)


def _bytes_of_weights(settings: Settings, k: int) -> int:
    return 4 * parameters_of(settings.model.shape(k))


def _peak_of_step(settings: Settings, k: int, plan: Plan, device: str) -> int:
    if device == "cuda" and settings.train.precision == "auto":  # the step below is one on the CPU
        settings = replace(settings, train=replace(settings.train, precision="bfloat16"))
    shape = settings.model.shape(k)
    # Outside of the fake mode, as the mask is looked at to see whether it masks anything.
    layout = step_layout(settings.objective, shape.patches, settings.train.seed, 0, plan.steps, "cpu")
    with torch.device("meta"):
        model = MaPeT(shape).train()
    model.grad_checkpointing = settings.execution.grad_checkpointing
    live = LiveBytes()
    with fake_tensors(), live:
        model.to_empty(device="cpu")
        loss = PretrainingLoss(model, settings, "cpu")
        count, patches = plan.micro_batch, shape.patches
        part = {
            "pixels": torch.empty(count, 3, shape.image_size, shape.image_size, dtype=torch.uint8),
            "order": torch.empty(count, patches, dtype=torch.int64),
            "tokens": torch.empty(count, patches, dtype=torch.int64),
            "uniform_draws": torch.empty(count, shape.depth, 2),
        }
        if settings.data.color_jitter:
            part |= {"jitter_factors": torch.empty(count, 3), "jitter_order": torch.zeros(count, 3, dtype=torch.int64)}
        kept = [[torch.empty_like(p) for p in model.parameters()] for _ in range(2 + (settings.train.ema is not None))]
        for _ in range(min(plan.parts, 2)):  # from the second part on, gradients are there
            loss(part, layout)[0].backward()
        del kept
    return live.peak


def measure(trainer: Trainer, loader: Iterator[dict[str, Tensor]], memory: int) -> None:
    """Takes twelve steps, times the last ten of them, and prints what all steps will take.

    Takes none where there is less memory than estimated.
    """
    plan, world = trainer.plan, trainer.world
    room = torch.cuda.mem_get_info()[0] if trainer.device == "cuda" else free_bytes()
    if memory > room:
        say(
            f"No steps were measured: about {as_text(memory)} are needed and {as_text(room)} are free. Lower "
            "execution.micro_batch, or set execution.grad_checkpointing=true."
        )
        return
    trainer.prepare()
    spent = []
    for step in range(min(WARM_UP + MEASURED, plan.steps)):
        began = time.perf_counter()
        trainer.step(step, [next(loader) for _ in range(plan.parts)])
        if trainer.device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    timed = spent[WARM_UP:] or spent
    a_step = statistics.mean(timed)
    table(
        f"Measured in {len(timed)} steps",
        [
            ("a step", f"{a_step:.3f} s, {trainer.settings.train.batch_size / a_step:,.1f} images/s"),
            ("shortest, longest", f"{min(timed):.3f} s, {max(timed):.3f} s"),
            (
                "all steps",
                f"{timedelta(seconds=round(a_step * plan.steps))} (h:mm:ss) on {world.size} such process(es)",
            ),
        ],
    )
