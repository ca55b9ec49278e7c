"""Which device and how many processes to use when the user did not say."""

import ctypes
import os
import shutil

from ..errors import UsageError

PEAK_BFLOAT16 = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 FLOP/s from the makers' data sheets."""


def peak_flops(device: str) -> float | None:
    """The greatest bfloat16 FLOP/s of one GPU, where its maker's figure is known; None on the CPU."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for known, peak in PEAK_BFLOAT16.items() if known in name), None)


def choose_device(device: str) -> str:
    """ "cpu" or "cuda" for "auto", "cpu" or "cuda"; UsageError if CUDA was asked for and is not there."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device} is unknown; choose auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device auto or cpu.")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return "cuda"
    keep_freed_memory()
    return "cpu"


def keep_freed_memory() -> None:
    """Has glibc keep freed memory of up to 1 GiB a piece for the next tensor; elsewhere nothing happens.

    By default it gives large activations back after every layer, and the kernel clears their pages again for the next:
    up to half of a convolutional tower's time on the CPU (benchmarks/freed_memory.py).
    """
    trim_threshold, mmap_threshold = -1, -3  # mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option in (trim_threshold, mmap_threshold):
        mallopt(option, 1 << 30)


def choose_workers(workers: int | None, device: str) -> int:
    """Processes that decode images: as asked, else none on the CPU (they would take the model's cores) and up to 16."""
    if workers is not None:
        return workers
    return 0 if device == "cpu" else min(16, os.cpu_count() or 1)


def refuse_many_processes() -> None:
    """Several processes would each do all of the work; better one sentence than silent waste."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("torchrun with more than one process is not supported yet; start this command directly.")


def refuse_missing_compiler() -> None:
    """torch.compile builds with a compiler of the machine, on the CPU and (Triton's launchers) on CUDA."""
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "c++", "clang++", "gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in names if name):
        raise UsageError("execution.compile=true needs a C++ compiler (such as g++) on this machine; install one.")
