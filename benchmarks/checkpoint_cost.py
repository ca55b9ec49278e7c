"""How long training stands still for a checkpoint that is written beside it, and for one that it waits for.

python benchmarks/checkpoint_cost.py [--size base] [--pairs 5] [--device cpu]

One JSON line. `held_up_s` is what `save` takes before it returns; `slowed_down_s` how much longer the steps took while
the checkpoint was written, against as many without; `synchronous_s` what training would wait for without the thread.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from mapet.shared.runtime.console import running_command
from mapet.shared.runtime.devices import choose_device
from mapet.shared.runtime.distributed import World
from mapet.train_stage.settings import resolve
from mapet.train_stage.tasks.pretraining import PretrainingModel
from mapet.train_stage.training.plan import make_plan
from mapet.train_stage.training.trainer import Trainer
from mapet.train_stage.weights.checkpoint import Checkpoints
from steps import K, training_batch


def main(size: str = "base", pairs: int = 5, batch: int = 2, device: str = "cpu") -> None:
    choose_device(device)
    settings = resolve(f"vit-{size}-16", [f"train.batch_size={batch}"])
    task = PretrainingModel(settings, K)
    trainer = Trainer(task, task.new_model(), make_plan(settings, 100, 1), World(), device)
    part = training_batch(batch)

    def step() -> None:
        trainer.step(0, [part])
        if device == "cuda":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep_last=1, keep_every=None)
        step()
        checkpoints.save(0, trainer.tensors(), {})
        checkpoints.finish()  # the memory of the copies is there from now on
        rows = [measure(checkpoints, trainer, step, at) for at in range(1, pairs + 1)]
        size_mb = sum(file.stat().st_size for file in checkpoints.finish().iterdir()) >> 20
    figures = {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}
    held = (figures["held_up_s"] + max(figures["slowed_down_s"], 0)) / figures["synchronous_s"]
    about = {"figure": f"checkpoint of vit-{size}", "device": device, "megabytes": size_mb, "pairs": pairs}
    print(json.dumps({**about, **figures, "asynchronous_over_synchronous": round(held, 3)}))


def measure(checkpoints: Checkpoints, trainer: Trainer, step: Callable[[], None], at: int) -> dict[str, float]:
    began = time.perf_counter()
    checkpoints.save(2 * at, trainer.tensors(), {})
    checkpoints.finish()
    synchronous = time.perf_counter() - began
    began = time.perf_counter()
    checkpoints.save(2 * at + 1, trainer.tensors(), {})
    held_up = time.perf_counter() - began
    steps, during = 0, time.perf_counter()
    while checkpoints.is_writing:
        step()
        steps += 1
    during = time.perf_counter() - during
    checkpoints.finish()
    alone = time.perf_counter()
    for _ in range(steps):
        step()
    alone = time.perf_counter() - alone
    return {
        "held_up_s": held_up,
        "slowed_down_s": during - alone,
        "synchronous_s": synchronous,
        "steps_meanwhile": steps,
        "step_s": alone / max(steps, 1),
    }


if __name__ == "__main__":
    with running_command():  # measured as the command runs, with its allocator settings
        typer.run(main)
