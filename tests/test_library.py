"""mapet as a library: importing and calling it prints nothing and leaves the process as it was."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import atexit, ctypes, logging, os, random, signal, sys, warnings
from pathlib import Path
import numpy as np
import faiss, open_clip, rich.style, timm, torch, torchvision, webdataset, zarr  # what they change on import is theirs

changes = []

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "mallopt":
            changes.append("the allocator")
        return super().__getattr__(name)

def install(number, handler, install=signal.signal):
    # Loader workers are processes of mapet's own; PyTorch's loader asks to hear of their deaths.
    if os.getpid() == process and number != signal.SIGCHLD:
        changes.append(f"the handler of {number}")
    return install(number, handler)

def process_state():
    return {
        "signal handlers": [
            signal.getsignal(number) for number in sorted(signal.valid_signals() - {signal.SIGCHLD})
        ],
        "loggers": [
            (list(logger.handlers), logger.level, logger.propagate)
            for logger in (logging.root, logging.getLogger("mapet"))
        ],
        "logging.disable": logging.root.manager.disable,
        "random states": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),
        "warnings": list(warnings.filters),
        "excepthook": sys.excepthook,
        "torch": (
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        ),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")},
        "folder": os.getcwd(),
    }

process = os.getpid()
ctypes.CDLL, signal.signal = Library, install
"""

IMPORTED = """
exit_handlers = atexit._ncallbacks()
before = process_state()
import mapet
for name in mapet.__all__:
    getattr(mapet, name)
assert changes == [], changes
assert process_state() == before, [name for name in before if process_state()[name] != before[name]]
print("unchanged")
"""

CALLED = """
import mapet
import mapet.shared.runtime.loader
images, tower, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
for name in mapet.__all__:
    getattr(mapet, name)
before = process_state()

def unchanged(what):
    after = process_state()
    assert changes == [], (what, changes)
    assert after == before, (what, [name for name in before if after[name] != before[name]])

def call(function, *arguments, **options):
    function(*map(str, arguments), **options)
    unchanged(function.__name__)

settings = [
    "model.name=null", "model.dim=32", "model.depth=1", "model.heads=2", "model.image_size=64", "model.patch_size=8",
    "train.epochs=1", "train.batch_size=32", "optimizer.warmup_epochs=0", "data.workers=1",
]
call(mapet.build_codebook, images, out / "codebook", tower=tower, k=16, restarts=1, iterations=2, workers=1)
call(mapet.encode_shards, images, out / "codebook", out / "tokens", workers=1)
call(mapet.verify, out / "tokens", codebook=out / "codebook", images=images, reencode=2)
call(mapet.inspect, out / "tokens", html=out / "tokens.html", images=images, codebook=out / "codebook")
call(mapet.pretrain, images, out / "tokens", out / "run", overrides=settings)
call(mapet.probe, out / "run", images, images, random_init=True, pixels=True)
call(mapet.report, out / "run", tokens=str(out / "tokens"), images=images)
call(mapet.features, images, out / "run", out / "features.zarr")
call(mapet.export, out / "run", out / "export")
call(mapet.import_weights, out / "run", out / "weights")
call(mapet.doctor)
mapet.demo(images, out=out / "demo")
unchanged("demo")
mapet.TokenStore(out / "tokens").to_torch()
mapet.load_weights(out / "weights")
unchanged("stores and weights")
print("unchanged")
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # torch warns of more workers than processors
    command = [sys.executable, "-c", SETUP + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_importing_changes_nothing():
    result = run(IMPORTED)
    assert (result.stderr, result.stdout) == ("", "unchanged\n")


@pytest.mark.campaign
def test_calling_functions_prints_nothing_and_changes_nothing(chain, tower, tmp_path: Path):
    result = run(CALLED, chain.images, tower, tmp_path)
    assert (result.stderr, result.stdout) == ("", "unchanged\n")
