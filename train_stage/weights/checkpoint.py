"""Checkpoints: folders that appear whole, hold no pickles, and are all that a run needs to go on bit-identically.

step-NNNNNNN/model.safetensors       weights, under the published names
step-NNNNNNN/optimizer.safetensors   AdamW's moments and counters, as NAME/SLOT
step-NNNNNNN/ema.safetensors         the moving average of the weights, where a run keeps one
step-NNNNNNN/state.json              everything else, and the size and SHA-256 of each of these files
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...shared.errors import DataError
from ...shared.runtime.console import say
from ...shared.storage.files import read_sealed_json, sha256_file, write_sealed_json, written_whole

FORMAT, VERSION = "mapet-checkpoint", 1
MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
_STATE = "state.json"

Tensors = Mapping[str, Mapping[str, Tensor]]
"""What a checkpoint holds: file name -> tensor name -> tensor."""


def save_checkpoint(run: Path, step: int, tensors: Tensors, about: dict[str, Any]) -> Path:
    """Writes `checkpoints/step-NNNNNNN/` with these tensors and `about` (JSON), and returns it."""
    path = run / "checkpoints" / f"step-{step:07d}"
    with written_whole(path) as partial:
        partial.mkdir()
        for name, content in tensors.items():
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, partial / name)
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": sha256_file(partial / name)} for name in tensors
        }
        about = {"format": FORMAT, "version": VERSION, "step": step, "files": files, **about}
        write_sealed_json(partial / _STATE, about)
        if path.exists():  # a damaged one, before which the run went on again
            shutil.rmtree(path)
    return path


class Checkpoints:
    """Writes the checkpoints of a run while training goes on, one at a time, and prunes them.

    The newest `keep_last` stay on disk, and those at multiples of `keep_every` steps.
    """

    def __init__(self, run: Path, keep_last: int, keep_every: int | None):
        self.newest = newest_checkpoint(run)
        self._run, self._keep_last, self._keep_every = run, keep_last, keep_every
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}

    def save(self, step: int, tensors: Tensors, about: dict[str, Any]) -> None:
        """Copies the tensors and returns; the copy is written by a thread.

        Waits for the checkpoint before, and raises the DataError that writing it ended with.
        """
        self.finish()
        copied, ready = self._copy(tensors)
        self._writing = self._writer.submit(self._write, step, copied, ready, about)

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._writing is not None and not self._writing.done()

    def finish(self) -> Path | None:
        """Waits until everything is on disk and returns the newest checkpoint, if there is any."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.newest = writing.result()
        return self.newest

    def _copy(self, tensors: Tensors) -> tuple[Tensors, torch.cuda.Event | None]:
        """The tensors in memory of our own, which every checkpoint uses again, and when it is filled."""
        copied: dict[str, dict[str, Tensor]] = {}
        on_gpu = any(tensor.is_cuda for content in tensors.values() for tensor in content.values())
        for name, content in tensors.items():
            copied[name] = {}
            for key, tensor in content.items():
                if (name, key) not in self._copies:
                    self._copies[name, key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copied[name][key] = self._copies[name, key].copy_(tensor, non_blocking=True)
        return copied, torch.cuda.current_stream().record_event() if on_gpu else None

    def _write(self, step: int, copied: Tensors, ready: torch.cuda.Event | None, about: dict[str, Any]) -> Path:
        if ready is not None:
            ready.synchronize()
        path = save_checkpoint(self._run, step, copied, about)
        prune(self._run, self._keep_last, self._keep_every)
        return path


def load_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, on the CPU. Raises DataError if it cannot be read."""
    try:
        return load_file(path / name)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path / name} is damaged ({str(error).splitlines()[0]}); use another checkpoint.") from None


def count_parameters(path: Path) -> int:
    """The number of parameters in a checkpoint, from the header of its weights alone."""
    with safe_open(path / MODEL, "pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (not a mapping)


def read_state(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` was told, and "step" and "files". Raises DataError if it was changed or is missing."""
    return read_sealed_json(path / _STATE, format=FORMAT, version=VERSION)


def check_whole(path: Path) -> dict[str, Any]:
    """The state of a checkpoint; DataError unless every byte of its files is as it was written."""
    state = read_state(path)
    for name, written in state["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != written["bytes"] or sha256_file(file) != written["sha256"]:
            raise DataError(f"{file} is damaged: it is not what was written (its digest does not match).")
    return state


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint folder of a run, or None."""
    return max((run / "checkpoints").glob("step-*"), default=None)


def newest_whole_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run of which no byte has changed, and its state; None if the run has none yet.

    Says which ones it passes over. Raises DataError if there are checkpoints and all are damaged.
    """
    found = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    for path in found:
        try:
            return path, check_whole(path)
        except DataError as error:
            say(f"{error} It is passed over.")
    if found:
        raise DataError(f"All checkpoints in {run / 'checkpoints'} are damaged; delete them to begin anew.")
    return None


def prune(run: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Deletes all but the newest `keep_last` checkpoints and those at multiples of `keep_every` steps."""
    for path in sorted((run / "checkpoints").glob("step-*"))[:-keep_last]:
        if keep_every is None or int(path.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(path)
