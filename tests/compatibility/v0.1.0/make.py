"""Writes the artifacts of this folder with the mapet that is imported, which must be version 0.1.0 at commit d9b3729.

PYTHONPATH=PARENT_OF_THAT_CHECKOUT OMP_NUM_THREADS=1 python make.py OUT

Every command runs in OUT with relative paths, so that no path of the machine gets into an artifact. The interrupted
artifacts are what a command leaves when SIGKILL ends it at a known point: `killed` wraps one function of the program so
that one of its calls sends the signal.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mapet
import torch
from mapet.shared.drawings import write_drawings

TOWER = Path(mapet.__file__).parent / "demo_assets" / "tower"
RELATIVE_TOWER = Path("quickstart", "tower")
CODEBOOK = ["--tower", f"local-dir:{RELATIVE_TOWER}", "--k", 16, "--restarts", 2, "--iterations", 4, "--patches", 200]
RUN = {
    "model.name": "null",
    "model.dim": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.image_size": 64,
    "model.patch_size": 8,
    "train.batch_size": 4,
    "train.epochs": 3,
    "train.ema": 0.9,
    "train.log_every": 3,
    "train.log_keys": "true",
    "train.checkpoint_every": 8,
    "train.keep_last": 9,
    "optimizer.warmup_epochs": 1,
    "probe.images": "images",
    "probe.val": "images",
    "probe.every": 8,
}
LIBRARIES = (
    *("torch", "torchvision", "timm", "open_clip_torch", "faiss-cpu", "numpy", "pillow", "simplejpeg"),
    *("safetensors", "zarr", "numcodecs"),
)
COMMAND_LINE = "from mapet.cli import main; main()"
KILLED = """
import os, signal
from mapet.{module} import {owner}
calls, original = [], {owner}.{name}
def replaced(*arguments, **options):
    calls.append(None)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    {before}
    return original(*arguments, **options)
{owner}.{name} = replaced
"""


def main(out: Path) -> None:
    out.mkdir(parents=True)
    os.chdir(out)
    RELATIVE_TOWER.parent.mkdir()
    RELATIVE_TOWER.symlink_to(TOWER)
    write_drawings(Path("images"), 24, seed=11, per_tar=12)
    tokenize()
    train()
    Path("inspect").mkdir()
    for folder in ("codebook", "tokens-zarr"):
        text = command("tokenize", "inspect", folder, "--json")
        (Path("inspect") / f"{folder}.json").write_text(json.dumps(json.loads(text), indent=1) + "\n")
    made_on = {
        "cpu": cpu(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    Path("made_on.json").write_text(json.dumps(made_on, indent=1) + "\n")
    shutil.rmtree("quickstart")


def tokenize() -> None:
    build = ["tokenize", "build-codebook", "images", *CODEBOOK]
    command(*build, "--out", "codebook", "--features-cache", "features-cache")
    killed("tokenize_stage.feature_cache", "FeatureCache", "write_part", 2, *build, "--out", "extracting")
    Path(".extracting.work").rename("extraction.work")
    # K-means keeps its state every few seconds; here it keeps each iteration and dies before it keeps the sixth.
    every_iteration = "arguments[0].every = 0"
    killed("tokenize_stage.kmeans_state", "SavedState", "keep", 6, *build, "--out", "training", before=every_iteration)
    Path(".training.work").rename("kmeans.work")
    encode = ["tokenize", "encode-shards", "images", "--codebook", "codebook"]
    command(*encode, "--out", "tokens-zarr")
    command(*encode, "--out", "tokens-webdataset", "--format", "webdataset", "--crop", "random-resized", "--views", 2)
    killed("tokenize_stage", "encode_shards", "write_shard", 2, *encode, "--out", "tokens-unfinished")


def train() -> None:
    settings = [word for key, value in RUN.items() for word in ("--set", f"{key}={value}")]
    command("train", "pretrain", "--images", "images", "--tokens", "tokens-zarr", "--out", "run", *settings)
    command("train", "import", "run", "--out", "weights")
    command("train", "export", "run", "--out", "export")
    command("train", "features", "images", "--weights", "run", "--out", "features.zarr")
    shutil.rmtree("run/checkpoints/step-0000016")
    shutil.rmtree("run/tensorboard")
    Path("run/.lock").unlink()


def command(*arguments: object, code: str = COMMAND_LINE) -> str:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def killed(module: str, owner: str, name: str, call: int, *arguments: object, before: str = "pass") -> None:
    """Runs a command that dies by SIGKILL when it calls `owner.name` for the `call`-th time."""
    code = KILLED.format(module=module, owner=owner, name=name, call=call, before=before) + COMMAND_LINE
    ended = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL, ended


def cpu() -> str:
    """The processor's name and the instructions that torch uses on it; bits depend on both."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
