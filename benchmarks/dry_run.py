"""What --dry-run foretells beside what then happens: one JSON line for each way to train.

python benchmarks/dry_run.py [--threads 2] [--steps 40] [--repeats 1] [--only tiny]

Memory is the peak of what is resident above that after imports; time is that of all steps, each side's median over
repeats that alternate. Other programs on the machine show in `spread`, the ratio of each repeat.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import rmtree
from statistics import median

import typer
from mapet.quickstart.demo import TOWER
from mapet.quickstart.drawings import write_drawings
from mapet.shared.runtime.distributed import World
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.train_stage.settings import resolve
from mapet.train_stage.tasks.pretraining import PretrainingModel
from mapet.train_stage.training.dry_run import estimate_memory
from mapet.train_stage.training.plan import make_plan

WAYS = {
    "tiny": ["model.name=vit-tiny"],
    "tiny, two parts": ["model.name=vit-tiny", "execution.micro_batch=8"],
    "tiny, bfloat16": ["model.name=vit-tiny", "train.precision=bfloat16"],
    "small, checkpointing": ["model.name=vit-small", "execution.grad_checkpointing=true"],
    "small, average kept": ["model.name=vit-small", "train.ema=0.999"],
    "tiny, steps after a checkpoint": ["model.name=vit-tiny", "train.checkpoint_every=5"],
}
COMMON = ["model.image_size=224", "model.patch_size=28", "train.batch_size=16", "optimizer.warmup_epochs=0.1"]
K = 64
TRAINED = """
import json, resource, sys, time
from pathlib import Path
import mapet.train_stage.pretrain, faiss, zarr
from mapet.shared.runtime.console import running_command
before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
with running_command():
    mapet.train_stage.pretrain.pretrain(*sys.argv[1:4], overrides=sys.argv[4:], device="cpu")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"bytes": peak - before}))
"""


def main(threads: int = 2, steps: int = 40, repeats: int = 1, only: str = "") -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_drawings(root / "images", 160, seed=1, per_tar=32)
        build_codebook(root / "images", root / "codebook", tower=f"local-dir:{TOWER}", k=K, restarts=1, iterations=5)
        encode_shards(root / "images", root / "codebook", root / "tokens")
        for name, overrides in WAYS.items():
            if not name.startswith(only):
                continue
            settings = [*COMMON, *overrides, f"train.epochs={steps // 10}"]
            found = [compare(root, name, settings) for _ in range(repeats)]
            print(json.dumps(summary(name, found)), flush=True)


def summary(name: str, found: list[dict]) -> dict:
    foretold, taken = (median(one[side] for one in found) for side in ("foretold_seconds", "seconds"))
    return {
        "figure": f"dry run, {name}",
        "memory_mb": max(one["bytes"] for one in found) >> 20,
        "memory_foretold_over_used": [round(one["foretold_bytes"] / one["bytes"], 3) for one in found],
        "seconds": round(taken, 1),
        "time_foretold_over_taken": round(foretold / taken, 3),
        "spread": [round(one["foretold_seconds"] / one["seconds"], 3) for one in found],
    }


def compare(root: Path, name: str, overrides: list[str]) -> dict:
    settings = resolve(None, overrides)
    foretold = estimate_memory(PretrainingModel(settings, K), make_plan(settings, 160), World(), "cpu").device
    rmtree(root / name, ignore_errors=True)
    words = ["--images", root / "images", "--tokens", root / "tokens", "--out", root / name, "--device", "cpu"]
    options = [word for one in overrides for word in ("--set", one)]
    start = [sys.executable, "-c", "from mapet.cli import main; main()", "train", "pretrain"]
    told = run([*start, *words, *options, "--dry-run"])
    a_step = float(re.search(r"a step.*?([\d.]+) s", told)[1])
    happened = run([sys.executable, "-c", TRAINED, root / "images", root / "tokens", root / name, *overrides])
    used = json.loads(happened.splitlines()[-1])["bytes"]
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    took = sum(16 * 10 / line["images_per_second"] for line in lines)
    return {
        "foretold_bytes": foretold,
        "bytes": used,
        "foretold_seconds": a_step * len(lines) * 10,
        "seconds": took,
    }


def run(command: list) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    typer.run(main)
