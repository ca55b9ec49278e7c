"""What k-means has found so far, and the file that it goes on from."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...shared.runtime.console import say
from ...shared.storage.files import written_whole


@dataclass
class KMeansRun:
    """What k-means has done: `history[restart][iteration]` holds objective, imbalance and empty clusters split.

    `centroids` (K, dim) float32 are those of the best restart so far, `best` its number. The objective is FAISS's: the
    sum over all rows of squared distances, or with metric "cosine" of similarities, to six digits.
    """

    history: list[list[dict[str, float]]] = field(default_factory=list)
    centroids: np.ndarray | None = None
    best: int | None = None
    best_objective: float | None = None
    current: np.ndarray | None = None

    def statistics(self) -> dict[str, Any]:
        """The history as JSON fields, one list an iteration for each restart."""
        columns = ("objective", "imbalance", "empty_clusters_split")
        return {name: [[step[name] for step in run] for run in self.history] for name in columns} | {
            "best_restart": self.best
        }


class SavedState:
    """The run in one file, replaced whole: a killed process leaves the last state or the one before."""

    def __init__(self, path: Path | None, identity: dict[str, Any], every: float):
        """`identity` says which k-means this is, `every` how many seconds may be lost. No path: nothing is kept."""
        self.path, self.identity, self.every = path, identity, every
        self.saved = time.monotonic()

    def load(self) -> KMeansRun:
        """The run that was kept, or a new one if there is none of this identity."""
        if self.path is None or not self.path.exists():
            return KMeansRun()
        try:
            with safe_open(self.path, "numpy") as file:
                about = json.loads((file.metadata() or {}).get("run", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError):
            about, tensors = {}, {}
        if about.pop("identity", None) != self.identity:
            say(f"{self.path} is of another k-means; starting over.")
            return KMeansRun()
        run = KMeansRun(**about, centroids=tensors.get("centroids"), current=tensors.get("current"))
        say(f"k-means goes on after {sum(len(past) for past in run.history)} iterations.")
        return run

    def keep(self, run: KMeansRun) -> None:
        """Keeps the run, if it is time to."""
        began = time.monotonic()
        if self.path is None or began - self.saved < self.every:
            return
        tensors = {name: getattr(run, name) for name in ("centroids", "current") if getattr(run, name) is not None}
        about = {"history": run.history, "best": run.best, "best_objective": run.best_objective}
        with written_whole(self.path) as partial:
            save_file(tensors, partial, metadata={"run": json.dumps({**about, "identity": self.identity})})
        self.saved = time.monotonic()
        # Large codebooks on slow disks: at most a twentieth of the time goes into saving.
        self.every = max(self.every, 20 * (self.saved - began)) if self.every else 0.0
