"""doctor: what is installed, what it can use, and what is missing; fit for a bug report."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .errors import UsageError
from .runtime.console import table
from .runtime.faiss_build import faiss_gpus, import_faiss

_PACKAGES = (
    "mapet",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "faiss-cpu",
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
_ONE_OF = ("faiss-cpu", "faiss-gpu-cu12")


def doctor() -> dict[str, Any]:
    """Versions, devices, the FAISS build, and `problems`: sentences that say what is missing and what to do."""
    packages = {name: _version(name) for name in _PACKAGES}
    problems = [f"{name} is not installed." for name, found in packages.items() if not found and name not in _ONE_OF]
    about = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "packages": packages,
        "devices": _devices(problems),
        "faiss": _faiss(packages, problems),
    }
    if about["devices"]["cuda"] and about["faiss"] and not about["faiss"]["gpus"]:
        problems.append(
            'FAISS is the CPU build beside a CUDA GPU; pip uninstall faiss-cpu, then pip install "mapet[gpu]".'
        )
    return {**about, "problems": problems}


def _version(package: str) -> str | None:
    try:
        return version(package)
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
    if all(packages[name] for name in _ONE_OF):
        problems.append(
            "faiss-cpu and faiss-gpu-cu12 are both installed and overwrite each other; uninstall both, install one."
        )
    try:
        faiss = import_faiss()
    except UsageError as error:
        problems.append(str(error))
        return None
    options = faiss.get_compile_options().strip() if hasattr(faiss, "get_compile_options") else ""
    return {
        "version": faiss.__version__,
        "build": "gpu" if faiss_gpus() else "cpu",
        "gpus": faiss_gpus(),
        "options": options,
    }


def show(about: dict[str, Any], *, as_json: bool = False) -> None:
    """Prints what `doctor` returned."""
    if as_json:
        print(json.dumps(about, indent=1))
        return
    devices, faiss = about["devices"], about["faiss"]
    rows = [
        ("python", f"{about['python']} on {about['system']}, {about['cpus']} CPUs, {about['memory_gib']} GiB"),
        ("CUDA devices", ", ".join(devices["cuda"]) or "none"),
        ("FAISS", f"{faiss['version']}, {faiss['build']} build ({faiss['options']})" if faiss else "missing"),
        *((name, found or "not installed") for name, found in about["packages"].items()),
        ("problems", "\n".join(about["problems"]) or "none"),
    ]
    table("mapet doctor", rows)
