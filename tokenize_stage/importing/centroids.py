"""Imports centroids that were computed elsewhere into a codebook."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...shared.artifacts.codes import MAX_K
from ...shared.errors import DataError, UsageError
from ...shared.runtime.console import say, table
from ...shared.runtime.devices import choose_device
from ...shared.storage.files import refuse_existing, sha256_file
from ...shared.tokens.codebook import Codebook
from ..kmeans.train import METRICS
from ..towers.opening import open_tower
from ..towers.tower import TowerSettings
from .arrays import open_array

_LENGTH_TOLERANCE = 1e-3


def import_centroids(file: Path, out: Path, settings: TowerSettings, metric: str, device: str) -> Codebook:
    """Writes the codebook of the centroids in `file` to `out`; see `import_tokens.import_codebook`."""
    if metric not in METRICS:
        raise UsageError(f"--metric {metric} is unknown; choose {' or '.join(METRICS)}.")
    centroids = _read_centroids(file, metric)
    source = {"name": file.name, "sha256": sha256_file(file)}
    request = {**asdict(settings), "metric": metric, "imported": source}
    if (out / "centroids.safetensors").exists() and Codebook.load(out).description.get("request") == request:
        say(f"{out} already holds this codebook; nothing to do.")
        return Codebook.load(out)
    refuse_existing(out)
    opened = open_tower(settings, choose_device(device))
    if centroids.shape[1] != opened.dim:
        raise DataError(
            f"--centroids {file} have {centroids.shape[1]} dimensions, and --tower {settings.tower} (layer "
            f"{settings.layer}) gives features of {opened.dim}; give the tower and layer they were made with."
        )
    description = {
        **opened.description(),
        "k": len(centroids),
        "metric": metric,
        "imported": source,
        "request": request,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "timm", "numpy", "pillow")},
    }
    codebook = Codebook(centroids, np.zeros(len(centroids), dtype=np.int64), description)
    codebook.save(out)
    table(
        "Codebook, imported",
        [
            ("tower", f"{settings.tower} (layer {settings.layer}, {settings.precision})"),
            ("centroids", f"{codebook.k:,} of {opened.dim:,} dimensions, {metric}, from {file.name}"),
            ("grid", f"{codebook.grid[0]}x{codebook.grid[1]}"),
            ("fingerprint", codebook.fingerprint),
            ("written to", str(out)),
        ],
    )
    return codebook


def _read_centroids(file: Path, metric: str) -> NDArray[np.float32]:
    """The centroids (K, dim). Raises DataError for another shape or type, or for values that cannot be centroids."""
    array = open_array(file, "--centroids")
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] == 0:
        raise DataError(f"--centroids {file} holds {array.dtype} of shape {array.shape}; it must be floats (K, dim).")
    if not 2 <= len(array) <= MAX_K:
        raise DataError(f"--centroids {file} holds {len(array)} centroids; there must be 2 to {MAX_K}.")
    with np.errstate(over="ignore"):
        centroids = np.ascontiguousarray(array, dtype=np.float32)
    infinite = np.flatnonzero(~np.isfinite(centroids).all(axis=1))
    if len(infinite):
        raise DataError(f"--centroids {file} holds values that are not finite, first in row {infinite[0]}.")
    lengths = np.linalg.norm(centroids, axis=1)
    not_unit = np.flatnonzero(abs(lengths - 1) > _LENGTH_TOLERANCE)
    if metric == "cosine" and len(not_unit):
        row = not_unit[0]
        raise DataError(
            f"--centroids {file}: row {row} has length {lengths[row]:.4g}, and --metric cosine compares "
            "centroids of length one; give --metric l2 or normalise them."
        )
    return centroids
