"""The codebook: K centroids of patch features, with the description that is needed to compute the same tokens again."""

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save_file
from upath import UPath

from ..artifacts.fields import checked
from ..artifacts.schemas import CodebookDescription, TokenizerDescription
from ..artifacts.tensors import tensor_errors
from ..errors import DataError
from ..runtime.faiss_build import faiss_gpus, import_faiss
from ..storage.bounded import file_inside, read_bounded
from ..storage.files import canonical_json, read_sealed_json, sha256_file, write_sealed_json, written_whole
from ..storage.remote import as_path, is_remote
from .code_usage import usage
from .notebook import facts_html

FORMAT, VERSION = "mapet-codebook", 1
MAX_K = 65_536
_MOST_HEADER_BYTES = 1 << 20

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
"""The fields of a description that change tokens; the fingerprint covers them and the centroids."""
_ARTIFACT_FIELDS = ("format", "version", "fingerprint", "centroids_sha256")
"""The fields of `codebook.json` that are about the artifact itself; all others are the description."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """Centroids of a frozen tower's patch features, with their description and statistics.

    The nearest centroid of a patch's features is its token.
    """

    centroids: NDArray[np.float32]
    """(K, dim) float32."""
    counts: NDArray[np.int64]
    """(K,) int64: how many sampled patches each code won."""
    description: dict[str, Any] = field(repr=False)
    """The JSON of the artifact: tower, layer, preprocessing, grid, k-means, sample, quality."""

    @property
    def k(self) -> int:
        """How many centroids there are."""
        return len(self.centroids)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of one view's tokens."""
        height, width = self.description["grid"]
        return height, width

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the centroids' bytes and of the described fields that change tokens (`TOKEN_FIELDS`)."""
        relevant = {name: self.description[name] for name in TOKEN_FIELDS}
        digest = hashlib.sha256(np.ascontiguousarray(self.centroids, dtype="<f4").tobytes())
        digest.update(canonical_json(relevant).encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Codebook({self.fingerprint[:12]}: K={self.k}, {self.centroids.shape[1]} dimensions)"

    def _repr_html_(self) -> str:
        described = self.description
        facts: list[tuple[str, object]] = [
            ("K", f"{self.k:,} centroids of {self.centroids.shape[1]:,} dimensions, {described.get('metric')}"),
            ("tower", f"{described.get('tower')}, layer {described.get('layer')}"),
            ("tokens per view", f"{self.grid[0]}x{self.grid[1]}"),
        ]
        if self.counts.any():
            codes = usage(self.counts)
            facts += [
                ("codes used / dead", f"{codes['used']:,} / {codes['dead']:,} of the sample's patches"),
                ("perplexity", f"{codes['perplexity']:.1f} of {codes['codes']:,}"),
            ]
        return facts_html(f"Codebook {self.fingerprint}", facts)

    @cached_property
    def _index(self) -> Any:  # an index of FAISS
        faiss = import_faiss()
        index = faiss.IndexFlatL2(self.centroids.shape[1])
        index.add(self.centroids)
        if not faiss_gpus():
            return index
        if "LOCAL_RANK" in os.environ:  # under torchrun every process has its own GPU
            gpu = int(os.environ["LOCAL_RANK"]) % faiss_gpus()
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)
        return faiss.index_cpu_to_all_gpus(index)

    def assign(self, features: NDArray[np.floating[Any]]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """The nearest centroid of each feature, by FAISS's exact search.

        `features` is (n, dim) float32, already normalised if the metric is cosine (for unit vectors the nearest
        centroid by L2 has the largest cosine). Returns tokens (n,) uint16 and squared distances (n,) float32.
        """
        tokens, distances = self.nearest(features, 1)
        return tokens[:, 0].astype(np.uint16), distances[:, 0]

    def nearest(self, features: NDArray[np.floating[Any]], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `count` nearest centroids of each feature (see `assign`), the nearest first.

        Returns codes (n, count) int64 and squared distances (n, count) float32.
        """
        distances, codes = self._index.search(np.ascontiguousarray(features, dtype=np.float32), count)
        return codes, distances

    def save(self, path: Path) -> None:
        """Writes a folder with `codebook.json` and `centroids.safetensors`, atomically.

        Raises DataError if it cannot be written.
        """
        with written_whole(path) as partial:
            partial.mkdir()
            tensors: dict[str, NDArray[Any]] = {
                "centroids": np.ascontiguousarray(self.centroids),
                "counts": self.counts,
            }
            save_file(tensors, partial / "centroids.safetensors")
            write_sealed_json(partial / "codebook.json", self.as_json(sha256_file(partial / "centroids.safetensors")))

    def as_json(self, centroids_sha256: str) -> dict[str, Any]:
        """The content of `codebook.json`, given the digest of `centroids.safetensors`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "centroids_sha256": centroids_sha256,
            **self.description,
        }

    @classmethod
    def load(cls, path: str | Path | UPath) -> "Codebook":
        """Opens a codebook folder, local or at a URL.

        Raises DataError if it is missing, was changed, or does not have the fingerprint that it states.
        """
        folder = as_path(path)
        if not is_remote(folder) and not folder.is_dir():
            raise DataError(f"{folder} does not exist or is not a folder; --codebook takes what build-codebook wrote.")
        description = read_description(folder / "codebook.json")
        fields = checked(description, CodebookDescription, folder / "codebook.json", "build it again")
        centroids, counts = _read_centroids(folder, fields)
        described = {name: value for name, value in description.items() if name not in _ARTIFACT_FIELDS}
        codebook = cls(centroids, counts, described)
        if codebook.fingerprint != description["fingerprint"]:
            raise DataError(f"{folder} does not have the fingerprint that it states; build it again.")
        return codebook


def read_description(path: Path | UPath) -> dict[str, Any]:
    """The description of a tokenizer: `codebook.json` of a codebook, or embedded in a token store.

    Raises DataError if the file is missing, was changed, or has a field of the wrong type.
    """
    description = read_sealed_json(path, format=FORMAT, version=VERSION)
    checked(description, TokenizerDescription, path)
    return description


def _read_centroids(folder: Path | UPath, described: CodebookDescription) -> tuple[NDArray[Any], NDArray[Any]]:
    """The centroids (K, dim) float32 and counts (K,) int64. Raises DataError unless they are as described."""
    path = file_inside(folder, "centroids.safetensors")
    rebuild = "build the codebook again"
    with tensor_errors(str(path), rebuild):
        content = read_bounded(path, described.k * (4 * described.dim + 8) + _MOST_HEADER_BYTES)
        if hashlib.sha256(content).hexdigest() != described.centroids_sha256:
            raise DataError(f"{path} was changed since it was written (its digest does not match); build it again.")
        arrays = load(content)
    shapes = {"centroids": (described.k, described.dim), "counts": (described.k,)}
    found = {name: array.shape for name, array in arrays.items()}
    if found != shapes or [arrays[name].dtype.name for name in shapes] != ["float32", "int64"]:
        shown = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in sorted(arrays.items()))
        raise DataError(
            f"{path} holds {shown[:200]}, and codebook.json describes K = {described.k} centroids of {described.dim} "
            f"dimensions; {rebuild}."
        )
    if not np.isfinite(arrays["centroids"]).all() or (arrays["counts"] < 0).any():
        raise DataError(f"{path} holds centroids that are not finite, or counts below 0; {rebuild}.")
    return arrays["centroids"], arrays["counts"]
