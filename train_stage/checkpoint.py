"""Checkpoints: folders that appear whole, hold no pickles, and are all that a run needs to go on bit-identically."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..shared.errors import DataError
from ..shared.files import written_whole


def save_checkpoint(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, about: dict[str, Any]
) -> Path:
    """Writes `checkpoints/step-NNNNNNN/` with the weights, the optimizer's moments and `about` (JSON)."""
    path = run / "checkpoints" / f"step-{step:07d}"
    with written_whole(path) as partial:
        partial.mkdir()
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / "model.safetensors"
        )
        save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **about}, indent=1) + "\n")
    return path


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{slot}": tensor
        for name, parameter in model.named_parameters()
        for slot, tensor in optimizer.state[parameter].items()
    }


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores both in place and returns the step to go on from. Raises DataError if the folder is damaged."""
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
        parameters = dict(model.named_parameters())
        for slot_name, tensor in load_file(path / "optimizer.safetensors").items():
            name, _, slot = slot_name.rpartition("/")
            # AdamW keeps its step counters on the CPU and its moments beside the weights.
            device = "cpu" if slot == "step" else parameters[name].device
            optimizer.state[parameters[name]][slot] = tensor.to(device)
        return read_state(path)["step"]
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {str(error).splitlines()[0]}); delete it to go on from the "
            "checkpoint before it."
        ) from None


def read_state(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` was told: step, settings, fingerprint. Raises DataError if it cannot be read."""
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'state.json'} cannot be read ({error}); give a whole checkpoint.") from None


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint folder of a run, or None. Checkpoints appear whole, so the newest is a whole one."""
    return max((run / "checkpoints").glob("step-*"), default=None)


def prune(run: Path, keep_last: int) -> None:
    """Deletes all but the newest `keep_last` checkpoints."""
    for path in sorted((run / "checkpoints").glob("step-*"))[:-keep_last]:
        shutil.rmtree(path)
