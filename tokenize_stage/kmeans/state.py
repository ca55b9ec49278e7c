"""The progress of k-means, and the file from which it resumes."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...shared.runtime.console import say
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
            refuse_irregular(self.path)
            with tensor_errors(self.path, "delete it"), safe_open(self.path, "numpy") as file:
                content = msgspec.json.decode((file.metadata() or {}).get("run", "{}"))
                if not isinstance(content, dict) or content.get("identity") != self.identity:
                    say(f"{self.path} belongs to another k-means; starting over.")
                    return KMeansRun()
                progress = checked(content, _Progress, self.path)
                tensors = {name: file.get_tensor(name) for name in ("centroids", "current") if name in file.keys()}  # noqa: SIM118
            _refuse_other_tensors(self.path, tensors, self.identity)
        except DataError as error:
            say(f"{error} k-means starts over.")
            return KMeansRun()
        history = [[_as_dict(step) for step in restart] for restart in progress.history]
        centroids, current = tensors.get("centroids"), tensors.get("current")
        run = KMeansRun(history, centroids, progress.best, progress.best_objective, current)
        say(f"k-means resumes after {sum(len(past) for past in run.history)} iterations.")
        return run

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
