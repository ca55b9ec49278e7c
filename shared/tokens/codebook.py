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

from ..artifacts.codes import Tokens, token_dtype
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
_MOST_HEADER_BYTES = 1 << 20
INNER_PRODUCT = "inner_product"
"""The metric of a codebook whose token is the largest of `centroids @ features + bias`; others are l2 and cosine."""

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
    bias: NDArray[np.float32] | None = field(default=None, repr=False)
    """(K,) float32, with metric "inner_product" only."""

    @property
    def k(self) -> int:
        """How many centroids there are."""
        return len(self.centroids)

    @property
    def bias_or_zeros(self) -> NDArray[np.float32]:
        """(K,) float32: the bias, or zeros where the codebook has none."""
        return np.zeros(self.k, np.float32) if self.bias is None else self.bias

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
        if self.bias is not None:
            digest.update(np.ascontiguousarray(self.bias, dtype="<f4").tobytes())
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
        return self._on_gpus(index)

    @cached_property
    def _index_with_bias(self) -> Any:
        """The bias as one more dimension, in which every feature is 1."""
        index = import_faiss().IndexFlatIP(self.centroids.shape[1] + 1)
        index.add(np.concatenate([self.centroids, self.bias_or_zeros[:, None]], axis=1))
        return self._on_gpus(index)

    @staticmethod
    def _on_gpus(index: Any) -> Any:
        faiss = import_faiss()
        if not faiss_gpus():
            return index
        if "LOCAL_RANK" in os.environ:  # under torchrun every process has its own GPU
            gpu = int(os.environ["LOCAL_RANK"]) % faiss_gpus()
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu, index)
        return faiss.index_cpu_to_all_gpus(index)

    def assign(self, features: NDArray[np.floating[Any]]) -> tuple[Tokens, NDArray[np.float32]]:
        """The nearest centroid of each feature, by FAISS's exact search.

        `features` is (n, dim) float32, already normalised if the metric is cosine (for unit vectors the nearest
        centroid by L2 has the largest cosine). Returns tokens (n,), uint16 or, with K above 65,536, uint32, and squared
        distances (n,) float32; with metric "inner_product" the token of the largest inner product plus bias, and the
        negative of that sum.
        Raises DataError for features with NaN or infinity.
        """
        if self.description.get("metric") == INNER_PRODUCT:
            points = np.pad(np.asarray(features, dtype=np.float32), ((0, 0), (0, 1)), constant_values=1)
            scores, tokens = self._index_with_bias.search(points, 1)
            distances = -scores
        else:
            tokens, distances = self.nearest(features, 1)
        if len(tokens) and int(tokens.min()) < 0:  # FAISS's answer for NaN, -1, which as uint16 would be a token
            raise DataError(
                f"Features of patch {int(tokens[:, 0].argmin())} hold NaN or infinity, so that no centroid is nearest; "
                "check the tower's weights and precision."
            )
        return tokens[:, 0].astype(token_dtype(self.k)), distances[:, 0]

    def nearest(self, features: NDArray[np.floating[Any]], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The `count` nearest centroids of each feature (see `assign`), the nearest first.

        Returns codes (n, count) int64 and squared distances (n, count) float32.
        """
        distances, codes = self._index.search(np.ascontiguousarray(features, dtype=np.float32), count)
        return codes, distances

    def save(self, path: Path) -> None:
        """Writes a folder with `codebook.json` and `centroids.safetensors`, atomically.

        Raises DataError if it cannot be written or if a centroid holds NaN or infinity.
        """
        refuse_not_finite(
            self.centroids, f"{path} would hold", "nothing was written; check the features they come from"
        )
        with written_whole(path) as partial:
            partial.mkdir()
            tensors: dict[str, NDArray[Any]] = {
                "centroids": np.ascontiguousarray(self.centroids),
                "counts": self.counts,
            }
            if self.bias is not None:
                tensors["bias"] = self.bias
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

        Raises DataError if it is missing, was changed, does not have the fingerprint that it states, or if a centroid
        holds NaN or infinity.
        """
        folder = as_path(path)
        if not is_remote(folder) and not folder.is_dir():
            raise DataError(f"{folder} does not exist or is not a folder; --codebook takes what build-codebook wrote.")
        description = read_description(folder / "codebook.json")
        fields = checked(description, CodebookDescription, folder / "codebook.json", "build it again")
        centroids, counts, bias = _read_centroids(folder, fields)
        described = {name: value for name, value in description.items() if name not in _ARTIFACT_FIELDS}
        codebook = cls(centroids, counts, described, bias)
        if codebook.fingerprint != description["fingerprint"]:
            raise DataError(f"{folder} does not have the fingerprint that it states; build it again.")
        return codebook


def refuse_not_finite(centroids: NDArray[np.floating[Any]], place: str, remedy: str) -> None:
    """Raises DataError if a centroid of `centroids` (K, dim) holds NaN or infinity; the message is put together from
    `place`, such as "FOLDER holds", and `remedy`."""
    wrong = np.flatnonzero(~np.isfinite(centroids).reshape(len(centroids), -1).all(axis=1))
    if len(wrong):
        raise DataError(
            f"{place} centroids that are not finite ({len(wrong)} of {len(centroids)}, the first is {wrong[0]}); "
            f"{remedy}."
        )


def read_description(path: Path | UPath) -> dict[str, Any]:
    """The description of a tokenizer: `codebook.json` of a codebook, or embedded in a token store.

    Raises DataError if the file is missing, was changed, or has a field of the wrong type.
    """
    description = read_sealed_json(path, format=FORMAT, version=VERSION)
    checked(description, TokenizerDescription, path)
    return description


def _read_centroids(
    folder: Path | UPath, described: CodebookDescription
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """The centroids (K, dim) float32, counts (K,) int64 and, for inner products, a bias (K,) float32.

    Raises DataError unless they are as described.
    """
    path = file_inside(folder, "centroids.safetensors")
    rebuild = "build the codebook again"
    with tensor_errors(path, rebuild):
        content = read_bounded(path, described.k * (4 * described.dim + 12) + _MOST_HEADER_BYTES)
        if hashlib.sha256(content).hexdigest() != described.centroids_sha256:
            raise DataError(f"{path} was changed since it was written (its digest does not match); build it again.")
        arrays = load(content)
    shapes: dict[str, tuple[int, ...]] = {"centroids": (described.k, described.dim), "counts": (described.k,)}
    types = {"centroids": np.dtype(np.float32), "counts": np.dtype(np.int64)}
    if described.metric == INNER_PRODUCT and "bias" in arrays:
        shapes["bias"], types["bias"] = (described.k,), np.dtype(np.float32)
    found = {name: array.shape for name, array in arrays.items()}
    if found != shapes or {name: array.dtype for name, array in arrays.items()} != types:
        shown = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in sorted(arrays.items()))
        raise DataError(
            f"{path} holds {shown[:200]}, and codebook.json describes K = {described.k} centroids of {described.dim} "
            f"dimensions; {rebuild}."
        )
    refuse_not_finite(arrays["centroids"], f"{folder} holds", "build it again")
    if (arrays["counts"] < 0).any() or not np.isfinite(arrays.get("bias", 0)).all():
        raise DataError(f"{path} holds counts below 0, or a bias that is not finite; {rebuild}.")
    return arrays["centroids"], arrays["counts"], arrays.get("bias")
