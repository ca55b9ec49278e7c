"""A run as users start it: images/s, MFU, share of time waiting for data; what DDP costs. One JSON line a figure.

python benchmarks/train_speed.py [--size tiny --size small --size base] [--batch 256] [--steps 60] [--device cuda]
    [--set execution.attention=flex]

Pictures are drawn (64 pixels; decoding photographs costs more, benchmarks/loader.py). `--images` and `--tokens` take
others, with a 14x14 grid. On the CPU: --device cpu --size tiny --batch 8 --steps 6 --no-compiled.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from mapet.quickstart.drawings import write_drawings
from mapet.shared.runtime.console import running_command
from mapet.shared.runtime.distributed import World
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.settings import resolve
from mapet.train_stage.tasks.pretraining import PretrainingModel
from mapet.train_stage.training import trainer
from mapet.train_stage.training.plan import make_plan
from mapet.train_stage.training.trainer import Trainer
from steps import K, interleaved_seconds, training_batch
from torch.nn.parallel import DistributedDataParallel


def main(
    size: Annotated[list[str], typer.Option()] = ["tiny", "small", "base"],  # noqa: B006
    batch: int = 256,
    steps: int = 60,
    pairs: int = 10,
    compiled: bool = True,
    device: str = "cuda",
    images: str | None = None,
    tokens: str | None = None,
    overrides: Annotated[list[str], typer.Option("--set")] = [],  # noqa: B006
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if images is None:
            images, tokens = draw(root, batch, device)
        for one in size:
            settings = [
                f"train.batch_size={batch}",
                f"train.epochs={max(steps // 4, 2)}",
                f"execution.compile={compiled}",
                "optimizer.warmup_epochs=1",
                "train.precision=bfloat16",
                "train.log_every=4",
                f"model.name=vit-{one}",
                *overrides,
            ]
            pretrain(images, tokens, root / one, overrides=settings, device=device)
            lines = [json.loads(line) for line in (root / one / "metrics.jsonl").read_text().splitlines()]
            steady = lines[len(lines) // 2 :]
            found = {
                name: round(statistics.median(line[name] for line in steady), 4)
                for name in ("images_per_second", "data_wait", "mfu")
                if name in lines[0]
            }
            print(json.dumps({"figure": f"pretrain vit-{one}, batch {batch}", "set": overrides, **found}), flush=True)
        overhead = ddp_over_plain(size[0], batch, pairs, device)
        print(json.dumps({"figure": f"DDP over no DDP, vit-{size[0]}, one process", "ratio": overhead}), flush=True)


def draw(root: Path, batch: int, device: str) -> tuple[Path, Path]:
    write_drawings(root / "images", 4 * batch, seed=1, per_tar=batch)
    book = {"tower": "ViT-B-16", "pretrained": "none", "k": 64, "restarts": 1, "iterations": 5, "device": device}
    build_codebook(root / "images", root / "codebook", **book)
    encode_shards(root / "images", root / "codebook", root / "tokens", device=device)
    return root / "images", root / "tokens"


def ddp_over_plain(size: str, batch: int, pairs: int, device: str) -> float:
    """Time of a step under DistributedDataParallel in a world of one, over that of the same step without it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    store = torch.distributed.HashStore()
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    settings = resolve(f"vit-{size}-16", [f"train.batch_size={batch}", "train.precision=bfloat16"])
    part = training_batch(batch)
    task, ways = PretrainingModel(settings, K), []
    plain = trainer.wrap_parallel
    for spread in (lambda module, *_: DistributedDataParallel(module), plain):
        trainer.wrap_parallel = spread
        one = Trainer(task, task.new_model(), make_plan(settings, batch, 1), World(), device)
        ways.append(lambda one=one: one.step(0, [part]))
    trainer.wrap_parallel = plain
    ratio = statistics.median(a / b for a, b in interleaved_seconds(*ways, pairs, device))
    torch.distributed.destroy_process_group()
    return round(ratio, 3)


if __name__ == "__main__":
    with running_command():  # measured as the command runs, with its allocator settings
        typer.run(main)
