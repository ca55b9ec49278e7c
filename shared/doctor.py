"""doctor: versions, devices, the FAISS build and what is missing, for a bug report."""

import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from itertools import zip_longest
from typing import Any

from .errors import UsageError
from .runtime.console import results, table
from .runtime.faiss_build import faiss_gpus, import_faiss

_PACKAGES = (
    "mapet",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cu12",
    "webdataset",
    "zarr",
    "numpy",
    "pillow",
    "safetensors",
    "omegaconf",
    "typer",
    "rich",
    "tensorboard",
)
_FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12")
"""Distributions of the same module. The last one is the GPU build before there was an official wheel."""

_UNUSED_GPU = {
    "cpu": 'FAISS is the CPU build beside a CUDA GPU; pip uninstall faiss-cpu, then pip install "mapet[gpu]".',
    "gpu": "FAISS is the GPU build and finds no GPU, though PyTorch does; it needs a driver for CUDA 12.6 or newer.",
}


def doctor() -> dict[str, Any]:
    """Describes the installation as plain JSON values.

    Returns:
        "python", "system", "cpus", "memory_gib"; "packages", their versions by name, None if not installed; "devices",
        the CUDA devices and PyTorch's build; "faiss", its version and build, None if it cannot be imported; and
        "problems", sentences that say what is missing and what to do.
    """
    packages = {name: _version(name) for name in _PACKAGES}
    problems = [
        f"{name} is not installed."
        for name, installed in packages.items()
        if not installed and name not in _FAISS_PACKAGES
    ]
    devices, faiss = _devices(problems), _faiss(packages, problems)
    if devices["cuda"] and faiss and not faiss["gpus"]:
        problems.append(_UNUSED_GPU[faiss["build"]])
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "packages": packages,
        "devices": devices,
        "faiss": faiss,
        "problems": problems,
    }


def _version(package: str) -> str | None:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return None


def _devices(problems: list[str]) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        problems.append(f"torch cannot be imported ({error}).")
        return {"cuda": []}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cuda": names, "cuda_build": torch.version.cuda, "threads": torch.get_num_threads()}


def _faiss(packages: dict[str, str | None], problems: list[str]) -> dict[str, Any] | None:
    installed = [name for name in _FAISS_PACKAGES if packages[name]]
    if len(installed) > 1:
        problems.append(
            f"{' and '.join(installed)} are installed together and overwrite each other; uninstall all, install one."
        )
    try:
        faiss = import_faiss()
    except UsageError as error:
        problems.append(str(error))
        return None
    options = faiss.get_compile_options().strip() if hasattr(faiss, "get_compile_options") else ""
    return {
        "version": faiss.__version__,
        "build": "gpu" if faiss_gpus() or "GPU" in options.split() else "cpu",
        "gpus": faiss_gpus(),
        "options": options,
    }


def show(installation: dict[str, Any], *, as_json: bool = False) -> None:
    """Prints the result of `doctor` as a table, or as JSON."""
    if as_json:
        results.print_json(installation)
        return
    devices, faiss = installation["devices"], installation["faiss"]
    machine = f"{installation['system']}, {installation['cpus']} CPUs, {installation['memory_gib']} GiB"
    rows = [
        ("python", f"{installation['python']} on {machine}"),
        ("CUDA devices", ", ".join(devices["cuda"]) or "none"),
        ("FAISS", f"{faiss['version']}, {faiss['build']} build ({faiss['options']})" if faiss else "missing"),
        *((name, version or "not installed") for name, version in installation["packages"].items()),
        *zip_longest(["problems"], installation["problems"] or ["none"], fillvalue=""),
    ]
    table("mapet doctor", rows)
