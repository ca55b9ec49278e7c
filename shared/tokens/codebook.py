"""The codebook: K centroids of patch features, and everything needed to compute the same token again."""

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from ..errors import DataError
from ..runtime.faiss_build import faiss_gpus, import_faiss
from ..storage.files import canonical_json, read_sealed_json, sha256_file, write_sealed_json, written_whole
from ..storage.remote import as_path, is_remote, read_whole
from .code_usage import usage
from .notebook import facts_html

FORMAT, VERSION = "mapet-codebook", 1
MAX_K = 65_536

# The fields of `description` that change tokens; with the centroids they make the fingerprint.
TOKEN_FIELDS = (
    "library",
    "architecture",
    "weights_sha256",
    "layer",
    "final_norm",
    "precision",
    "preprocess",
    "grid",
    "metric",
)


@dataclass(frozen=True, eq=False)
class Codebook:
    """K centroids (K, dim) float32 of a frozen tower's patch features, with their description and statistics.

    `description` is the JSON of the artifact (tower, layer, preprocessing, grid, k-means, sample, quality);
    `counts` (K,) int64 says how many sampled patches each code won.
    """

    centroids: np.ndarray
    counts: np.ndarray
    description: dict[str, Any] = field(repr=False)

    @property
    def k(self) -> int:
        return len(self.centroids)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid of one image."""
        height, width = self.description["grid"]
        return height, width

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the centroids' bytes and the described fields that change tokens (`TOKEN_FIELDS`)."""
        relevant = {name: self.description[name] for name in TOKEN_FIELDS}
        whole = hashlib.sha256(np.ascontiguousarray(self.centroids, dtype="<f4").tobytes())
        whole.update(canonical_json(relevant).encode())
        return whole.hexdigest()

    def __repr__(self) -> str:
        return f"Codebook({self.fingerprint[:12]}: K={self.k}, {self.centroids.shape[1]} dimensions)"

    def _repr_html_(self) -> str:
        made_by = self.description
        facts = [
            ("K", f"{self.k:,} centroids of {self.centroids.shape[1]:,} dimensions, {made_by.get('metric')}"),
            ("tower", f"{made_by.get('tower')}, layer {made_by.get('layer')}"),
            ("tokens of a view", f"{self.grid[0]}x{self.grid[1]}"),
        ]
        if self.counts.any():
            codes = usage(self.counts)
            facts += [
                ("codes used / dead", f"{codes['used']:,} / {codes['dead']:,} of the sample's patches"),
                ("perplexity", f"{codes['perplexity']:.1f} of {codes['codes']:,}"),
            ]
        return facts_html(f"Codebook {self.fingerprint}", facts)

    @cached_property
    def _index(self):
        faiss = import_faiss()
        index = faiss.IndexFlatL2(self.centroids.shape[1])
        index.add(self.centroids)
        if not faiss_gpus():
            return index
        if "LOCAL_RANK" in os.environ:  # under torchrun each process has a GPU of its own
            gpu = int(os.environ["LOCAL_RANK"]) % faiss_gpus()
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)
        return faiss.index_cpu_to_all_gpus(index)

    def assign(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest centroid of each feature, by FAISS's exact search.

        `features` is (n, dim) float32, already normalised if the metric is cosine (on unit vectors the nearest
        centroid by L2 is the one of the largest cosine). Returns tokens (n,) uint16 and squared distances (n,)
        float32.
        """
        tokens, distances = self.nearest(features, 1)
        return tokens[:, 0].astype(np.uint16), distances[:, 0]

    def nearest(self, features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The `count` nearest centroids of each feature (as `assign` takes them), the nearest first.

        Returns codes (n, count) int64 and squared distances (n, count) float32.
        """
        distances, codes = self._index.search(np.ascontiguousarray(features, dtype=np.float32), count)
        return codes, distances

    def save(self, path: Path) -> None:
        """Writes the folder `codebook.json` + `centroids.safetensors`, whole or not at all."""
        with written_whole(path) as partial:
            partial.mkdir()
            tensors = {"centroids": np.ascontiguousarray(self.centroids), "counts": self.counts}
            save_file(tensors, partial / "centroids.safetensors")
            write_sealed_json(partial / "codebook.json", self.as_json(sha256_file(partial / "centroids.safetensors")))

    def as_json(self, centroids_sha256: str) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "centroids_sha256": centroids_sha256,
            **self.description,
        }

    @classmethod
    def load(cls, path: str | Path) -> "Codebook":
        """Opens a codebook folder. Raises DataError if it is missing, damaged or not what its fingerprint says."""
        path = as_path(path)
        if not is_remote(path) and not path.is_dir():
            raise DataError(f"{path} does not exist or is no folder; --codebook takes what build-codebook wrote.")
        description = read_description(path / "codebook.json")
        weights = path / "centroids.safetensors"
        try:
            content = read_whole(weights)
            intact = hashlib.sha256(content).hexdigest() == description["centroids_sha256"]
            tensors = load(content) if intact else {}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{weights} cannot be read ({error}); build the codebook again.") from None
        if not intact:
            raise DataError(f"{weights} was changed since it was written (its digest does not match); build it again.")
        fields = {
            k: v for k, v in description.items() if k not in ("format", "version", "fingerprint", "centroids_sha256")
        }
        codebook = cls(tensors["centroids"], tensors["counts"], fields)
        if codebook.fingerprint != description["fingerprint"]:
            raise DataError(f"{path} does not have the fingerprint that it states; build it again.")
        return codebook


def read_description(path: Path) -> dict[str, Any]:
    """The JSON of a codebook, from its folder or embedded in a token store; DataError if missing or changed."""
    return read_sealed_json(path, format=FORMAT, version=VERSION)
