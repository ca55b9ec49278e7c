"""The progress of k-means, and the file from which it resumes."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from ...shared.artifacts.fields import Count, Finite, checked
from ...shared.artifacts.tensors import tensor_errors
from ...shared.errors import DataError
from ...shared.runtime.console import say
from ...shared.storage.bounded import refuse_irregular
from ...shared.storage.files import written_whole


@dataclass
class KMeansRun:
    """The progress of k-means over all restarts.

    The objective is FAISS's: the sum over all rows of squared distances, or with metric "cosine" of similarities, to
    six digits.
    """

    history: list[list[dict[str, float]]] = field(default_factory=list)
    """`history[restart][iteration]` holds objective, imbalance and empty clusters split."""
    centroids: NDArray[np.float32] | None = None
    """(K, dim), those of the best restart so far."""
    best: int | None = None
    """The number of the best restart."""
    best_objective: float | None = None
    current: NDArray[np.float32] | None = None
    """(K, dim), those of the restart in progress; None between restarts."""

    def best_centroids(self) -> NDArray[np.float32]:
        """(K, dim) of a run that has finished at least one restart."""
        if self.centroids is None:
            raise RuntimeError("k-means has not finished a restart")
        return self.centroids

    def statistics(self) -> dict[str, Any]:
        """The history as JSON fields: for each restart a list with one value per iteration."""
        columns = ("objective", "imbalance", "empty_clusters_split")
        return {name: [[step[name] for step in run] for run in self.history] for name in columns} | {
            "best_restart": self.best
        }


class _Iteration(Struct):
    objective: Finite
    imbalance: Finite
    empty_clusters_split: Finite


class _Progress(Struct, forbid_unknown_fields=True):
    """The JSON of a saved run."""

    history: list[list[_Iteration]]
    best: Count | None
    best_objective: Finite | None


class SavedState:
    """A file that holds the run. It is replaced atomically, so that a killed process leaves a complete state."""

    def __init__(self, path: Path | None, identity: dict[str, Any], every: float):
        """Keeps the run at `path`; None keeps nothing.

        `identity` names the rows and the settings; a state of another identity is not resumed. `every` is the number of
        seconds between two saves.
        """
        self.path, self.identity, self.every = path, identity, every
        self.saved = time.monotonic()

    def load(self) -> KMeansRun:
        """The saved run, or a new one if there is none of this identity."""
        if self.path is None or not self.path.exists():
            return KMeansRun()
        try:
            run = self._read(self.path)
        except DataError as error:
            say(f"{error} It is not used; starting over.")
            return KMeansRun()
        if run is None:
            say(f"{self.path} belongs to another k-means; starting over.")
            return KMeansRun()
        say(f"k-means resumes after {sum(len(past) for past in run.history)} iterations.")
        return run

    def _read(self, path: Path) -> KMeansRun | None:
        """The run in the file; None for one of another identity. Raises DataError for a file that is damaged."""
        refuse_irregular(path)
        with tensor_errors(path, "delete it"), safe_open(path, "numpy") as file:
            content = json.loads((file.metadata() or {}).get("run", "{}"))
            if not isinstance(content, dict) or content.pop("identity", None) != self.identity:
                return None
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            expected = (self.identity["k"], self.identity["shape"][1])
            if not shapes.keys() <= {"centroids", "current"} or set(shapes.values()) - {expected}:
                raise ValueError(f"tensors {shapes} instead of centroids of shape {expected}")
            tensors = {name: file.get_tensor(name) for name in shapes}
        if any(tensor.dtype != np.float32 or not np.isfinite(tensor).all() for tensor in tensors.values()):
            raise DataError(f"{path} holds centroids that are not finite float32 numbers; delete it.")
        progress = checked(content, _Progress, path, "delete it")
        finished = len(progress.history) - ("current" in tensors)
        is_sound = (
            finished >= 0 and all(progress.history[:finished]) and len(progress.history) <= self.identity["restarts"]
        )
        has_best = None not in (progress.best, progress.best_objective) and "centroids" in tensors
        if not is_sound or has_best != (finished > 0) or (progress.best or 0) >= max(finished, 1):
            raise DataError(f"{path} states a progress that no k-means has; delete it.")
        return KMeansRun(**content, centroids=tensors.get("centroids"), current=tensors.get("current"))

    def keep(self, run: KMeansRun) -> None:
        """Saves the run, if the last save is long enough ago."""
        began = time.monotonic()
        if self.path is None or began - self.saved < self.every:
            return
        tensors = {name: getattr(run, name) for name in ("centroids", "current") if getattr(run, name) is not None}
        progress = {"history": run.history, "best": run.best, "best_objective": run.best_objective}
        with written_whole(self.path) as partial:
            save_file(tensors, partial, metadata={"run": json.dumps({**progress, "identity": self.identity})})
        self.saved = time.monotonic()
        # Large codebooks on slow disks: at most a twentieth of the time goes into saving.
        self.every = max(self.every, 20 * (self.saved - began)) if self.every else 0.0
