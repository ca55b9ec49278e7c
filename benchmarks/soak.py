"""A long run of a tiny model: do memory and open files stay as they are? Prints one JSON line.

python benchmarks/soak.py [--steps 10000] [--workers 1]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import typer
from mapet.quickstart.demo import TOWER
from mapet.quickstart.drawings import write_drawings
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards

IMAGES, BATCH = 512, 8
SETTINGS = {
    "model.name": "null",
    "model.dim": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.image_size": 64,
    "model.patch_size": 8,
    "train.batch_size": BATCH,
    "train.checkpoint_every": 100,
    "train.ema": 0.999,
    "optimizer.warmup_epochs": 1,
}


def main(steps: int = 10000, workers: int = 1) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_drawings(root / "images", IMAGES, seed=1, per_tar=64)
        build_codebook(root / "images", root / "codebook", tower=f"local-dir:{TOWER}", k=32, restarts=1, iterations=5)
        encode_shards(root / "images", root / "codebook", root / "tokens")
        settings = {**SETTINGS, "train.epochs": steps * BATCH // IMAGES, "data.workers": workers}
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-c", "from mapet.cli import main; main()", "train", "pretrain", "--device", "cpu"]
        options = ["--images", root / "images", "--tokens", root / "tokens", "--out", root / "run"]
        began = time.monotonic()
        process = subprocess.Popen([*map(str, [*command, *options]), *words], stdout=subprocess.DEVNULL)
        samples = [sample for sample in watch(process, root / "run" / "metrics.jsonl") if sample]
        quarter = len(samples) // 4
        first, last = samples[quarter // 4 : quarter], samples[-quarter:]
        figures = {"figure": "soak", "steps": steps, "workers": workers, "seconds": round(time.monotonic() - began)}
        for name in ("resident_mb", "handles"):
            before, after = (statistics.mean(sample[name] for sample in part) for part in (first, last))
            figures |= {
                f"{name}_first_quarter": round(before, 1),
                f"{name}_last_quarter": round(after, 1),
                f"{name}_growth": round(after / before - 1, 4),
            }
        figures["exit_code"] = process.wait()
        print(json.dumps({**figures, "samples": len(samples)}))


def watch(process: subprocess.Popen, metrics: Path):
    """Memory and handles of the run and its loader workers, ten times a second once it trains."""
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_size:
            yield look(process.pid)
        time.sleep(0.1)


def look(pid: int) -> dict[str, int] | None:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        resident, handles = 0, 0
        for one in (str(pid), *children):
            # What a worker shares with the trainer counts once a process, in all samples alike.
            resident += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * 4096
            handles += len(list(Path(f"/proc/{one}/fd").iterdir()))
    except (OSError, ValueError):  # it ended while it was looked at
        return None
    return {"resident_mb": resident / 2**20, "handles": handles}


if __name__ == "__main__":
    typer.run(main)
