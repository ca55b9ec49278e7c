"""Which device and how many worker processes to use where the user did not say."""

import ctypes
import os
import shutil

from ..errors import UsageError
from .console import in_command

PEAK_BFLOAT16 = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 FLOP/s from the vendors' data sheets."""


def peak_flops(device: str) -> float | None:
    """Peak bfloat16 FLOP/s of one GPU if its data sheet is known here; None for other GPUs and the CPU."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((peak for known, peak in PEAK_BFLOAT16.items() if known in name), None)


def choose_device(device: str) -> str:
    """Resolves "auto", "cpu" or "cuda" to "cpu" or "cuda".

    A command that runs on the CPU also keeps freed memory (see `keep_freed_memory`); a library call leaves the
    allocator alone.

    Raises:
        UsageError: another name, or "cuda" where PyTorch sees no CUDA device.
    """
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device} is unknown; choose auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device auto or cpu.")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return "cuda"
    if in_command():
        keep_freed_memory()
    return "cpu"


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks of up to 1 GiB for the next tensor; does nothing with other C libraries.

    By default glibc returns large activations to the kernel after every layer, and the kernel clears the pages again
    for the next one: up to half of a convolutional tower's time on the CPU (benchmarks/freed_memory.py).
    """
    trim_threshold, mmap_threshold = -1, -3  # mallopt(3)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option in (trim_threshold, mmap_threshold):
        mallopt(option, 1 << 30)


def choose_workers(workers: int | None, device: str) -> int:
    """Number of processes that decode images: `workers` if given, else up to 16 on CUDA and 0 on the CPU, where they
    would compete with the model for cores."""
    if workers is not None:
        return workers
    return 0 if device == "cpu" else min(16, os.cpu_count() or 1)


def refuse_many_processes() -> None:
    """Raises UsageError under torchrun with several processes, each of which would repeat all of the work."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("torchrun with more than one process is not supported yet; start this command directly.")


def refuse_missing_compiler(setting: str) -> None:
    """Raises UsageError if there is no C++ compiler, which torch.compile needs on the CPU and Triton on CUDA; `setting`
    is what asks for it."""
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "c++", "clang++", "gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in names if name):
        raise UsageError(f"{setting} needs a C++ compiler (such as g++) on this machine; install one.")
