"""Checkpoints: folders that appear complete, hold no pickles, and let a run resume bit-identically.

step-NNNNNNN/model.safetensors       weights, under the published names
step-NNNNNNN/optimizer.safetensors   AdamW's moments and step counters, as NAME/SLOT
step-NNNNNNN/ema.safetensors         the moving average of the weights, if the run keeps one
step-NNNNNNN/state.json              everything else, and the size and SHA-256 of each of these files
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...shared.artifacts.fields import checked
from ...shared.artifacts.tensors import FLOATS, read_shapes, tensor_errors
from ...shared.errors import DataError
from ...shared.runtime.console import say
from ...shared.storage.bounded import file_inside
from ...shared.storage.files import read_sealed_json, sha256_file, write_sealed_json, written_whole
from .schema import CheckpointState

FORMAT, VERSION = "mapet-checkpoint", 1
MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
_STATE = "state.json"

Tensors = Mapping[str, Mapping[str, Tensor]]
"""The tensors of a checkpoint: file name -> tensor name -> tensor."""


def save_checkpoint(run: Path, step: int, tensors: Tensors, metadata: dict[str, Any]) -> Path:
    """Writes a checkpoint folder and returns it.

    Args:
        run: the run's folder; the checkpoint becomes its `checkpoints/step-NNNNNNN/`.
        step: the number of steps done.
        tensors: the tensors of each file.
        metadata: everything else that resuming needs, as plain JSON values.
    """
    path = run / "checkpoints" / f"step-{step:07d}"
    with written_whole(path) as partial:
        partial.mkdir()
        for name, content in tensors.items():
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, partial / name)
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": sha256_file(partial / name)} for name in tensors
        }
        state = {"format": FORMAT, "version": VERSION, "step": step, "files": files, **metadata}
        write_sealed_json(partial / _STATE, state)
        if path.exists():  # a damaged one; the run resumed from an earlier checkpoint
            shutil.rmtree(path)
    return path


class Checkpoints:
    """Writes a run's checkpoints in a thread while training continues, one at a time, and prunes old ones.

    The newest `keep_last` checkpoints stay on disk, and those at multiples of `keep_every` steps.
    """

    def __init__(self, run: Path, keep_last: int, keep_every: int | None):
        self.newest = newest_checkpoint(run)
        """The newest checkpoint that is on disk."""
        self._run, self._keep_last, self._keep_every = run, keep_last, keep_every
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}

    def save(self, step: int, tensors: Tensors, metadata: dict[str, Any]) -> None:
        """Copies the tensors and returns; a thread writes the copy. Arguments: see `save_checkpoint`.

        Waits for the previous checkpoint, and raises the DataError that writing it ended with.
        """
        self.finish()
        copied, ready = self._copy(tensors)
        self._writing = self._writer.submit(self._write, step, copied, ready, metadata)

    @property
    def is_writing(self) -> bool:
        """Whether the thread is writing a checkpoint."""
        return self._writing is not None and not self._writing.done()

    def finish(self) -> Path | None:
        """Waits until everything is on disk and returns the newest checkpoint, or None.

        Raises:
            DataError if the last checkpoint could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.newest = writing.result()
        return self.newest

    def _copy(self, tensors: Tensors) -> tuple[Tensors, torch.cuda.Event | None]:
        """Copies the tensors into host memory that every checkpoint reuses; the event ends when a GPU has filled it."""
        copied: dict[str, dict[str, Tensor]] = {}
        on_gpu = any(tensor.is_cuda for content in tensors.values() for tensor in content.values())
        for name, content in tensors.items():
            copied[name] = {}
            for key, tensor in content.items():
                if (name, key) not in self._copies:
                    self._copies[name, key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copied[name][key] = self._copies[name, key].copy_(tensor, non_blocking=True)
        return copied, torch.cuda.current_stream().record_event() if on_gpu else None

    def _write(self, step: int, copied: Tensors, ready: torch.cuda.Event | None, metadata: dict[str, Any]) -> Path:
        if ready is not None:
            ready.synchronize()
        path = save_checkpoint(self._run, step, copied, metadata)
        prune(self._run, self._keep_last, self._keep_every)
        return path


def load_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, on the CPU.

    Raises:
        DataError if the file cannot be read.
    """
    remedy = "use another checkpoint"
    read_shapes(path / name, remedy, (*FLOATS, "I64"))
    with tensor_errors(path / name, remedy):
        return load_file(path / name)


def count_parameters(path: Path) -> int:
    """The number of parameters in a checkpoint, from the header of its weights alone."""
    with safe_open(path / MODEL, "pt") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (not a mapping)


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's metadata, with its "step" and "files".

    Raises:
        DataError if state.json is missing, was changed, or does not hold what a checkpoint needs.
    """
    state = read_sealed_json(path / _STATE, format=FORMAT, version=VERSION)
    fields = checked(state, CheckpointState, path / _STATE, "use another checkpoint")
    stated = _step_of(path)
    if stated is not None and fields.step != stated:
        raise DataError(f"{path / _STATE} is of step {fields.step}; use another checkpoint.")
    return state


def check_whole(path: Path) -> dict[str, Any]:
    """Checks every byte of a checkpoint's files and returns its state.

    Raises:
        DataError if a file is missing or was changed.
    """
    state = read_state(path)
    for name, written in state["files"].items():
        file = Path(str(file_inside(path, name)))
        if not file.is_file() or file.stat().st_size != written["bytes"] or sha256_file(file) != written["sha256"]:
            raise DataError(f"{file} is damaged: it was changed after it was written (its digest does not match).")
    return state


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint folder of a run, or None."""
    return max(_checkpoints(run), default=None)


def _checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, the oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if _step_of(path) is not None)


def _step_of(path: Path) -> int | None:
    """The number of steps in the name of a checkpoint folder; None for another name."""
    number = path.name.removeprefix("step-")
    return int(number) if path.name != number and number.isascii() and number.isdigit() and len(number) < 16 else None


def newest_whole_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of a run and its state; None if the run has no checkpoint yet.

    A line on stderr names each damaged checkpoint that is skipped.

    Raises:
        DataError if there are checkpoints and all of them are damaged.
    """
    checkpoints = _checkpoints(run)[::-1]
    for path in checkpoints:
        try:
            return path, check_whole(path)
        except DataError as error:
            say(f"{error} It is skipped.")
    if checkpoints:
        raise DataError(
            f"All checkpoints in {run / 'checkpoints'} are damaged; delete them to start again from step 0."
        )
    return None


def prune(run: Path, keep_last: int, keep_every: int | None = None) -> None:
    """Deletes all but the newest `keep_last` checkpoints and those at multiples of `keep_every` steps."""
    for path in _checkpoints(run)[:-keep_last]:
        if keep_every is None or int(path.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(path)
