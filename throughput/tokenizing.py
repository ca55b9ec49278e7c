"""Tokenizing in parts: from bytes to tokens beside the bare tower, k-means and assignment beside FAISS."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shared.images.decode import read_image
from ..shared.images.views import CENTER, Preprocess, center_view, to_array
from ..shared.runtime.faiss_build import faiss_gpus, import_faiss
from ..shared.sources.records import ImageRecord
from ..shared.tokens.codebook import Codebook
from ..tokenize_stage.encoding.shards import Encoder
from ..tokenize_stage.kmeans.state import KMeansRun
from ..tokenize_stage.kmeans.train import KMeansSettings, Steps, run_restarts
from ..tokenize_stage.tokenizers.base import Tokenizer
from ..tokenize_stage.tokenizers.nearest_code import NearestCode
from ..tokenize_stage.towers.features import Request
from ..tokenize_stage.towers.tower import Tower
from .rates import cycled, steady

_NOISE = 0.1
_BATCHES = 2
_KMEANS_K, _KMEANS_ITERATIONS = 256, 2
_KMEANS_FLOATS, _KMEANS_FLOATS_ON_GPU = 1 << 21, 1 << 28
"""So many numbers are clustered: well under a second of work, whatever their dimension."""


def ready_pixels(records: Sequence[ImageRecord], preprocess: Preprocess) -> Tensor:
    """uint8 (n, 3, S, S): the centre views of images, as a tower takes them."""
    return torch.stack(
        [torch.from_numpy(to_array(center_view(read_image(record)[0], preprocess))) for record in records]
    )


def with_random_codes(tower: Tower, k: int, pixels: Tensor) -> NearestCode:
    """A tokenizer whose centroids are random patches of `pixels` (n, 3, S, S), with noise: as fast as a trained one."""
    random = np.random.default_rng(0)
    features = tower.features(pixels).flatten(0, 1).cpu().numpy()
    noise = random.normal(0, _NOISE, (k, tower.dim)).astype(np.float32)
    centroids = np.ascontiguousarray(features[random.integers(0, len(features), k)] + noise)
    codebook = Codebook(centroids, np.zeros(k, np.int64), {**tower.description(), "k": k, "metric": "l2"})
    return NearestCode(tower, codebook, codebook.as_json(""))


@dataclass(frozen=True)
class Encoding:
    """Ways to compute the same images: two sides of a comparison."""

    tokenizer: Tokenizer
    records: Sequence[ImageRecord]
    pixels: Tensor
    """uint8 (batch_size, 3, S, S): images that are decoded and resized already."""
    workers: int

    def encode(self) -> tuple[float, float]:
        """Images, and seconds from their bytes to their tokens, as encode-shards computes them."""
        size = len(self.pixels)
        encoder = Encoder(self.tokenizer, CENTER, False, size, self.workers)
        batches = self.workers + _BATCHES * max(self.workers, 1)
        groups = cycled([Request(record) for record in self.records], size, batches)
        return steady(encoder.batches(groups), self.workers, lambda batch: len(batch[0].records))

    def forward(self) -> None:
        """The tower alone, on ready tensors."""
        self.tokenizer.features(self._on_device)

    def features(self) -> Tensor:
        """Features (patches, dim) of the ready tensors on their device, to be assigned."""
        return self.tokenizer.features(self._on_device).flatten(0, 1)

    @cached_property
    def _on_device(self) -> Tensor:
        return self.pixels.to(self.tokenizer.device)


@dataclass(frozen=True)
class Clustering:
    """k-means of random rows: ours and FAISS's own, with the same iterations."""

    rows: NDArray[np.float16]
    k: int

    @property
    def distances(self) -> int:
        """How many pairs of a row and a centroid are compared."""
        return len(self.rows) * self.k * _KMEANS_ITERATIONS

    def ours(self) -> None:
        """As build-codebook clusters a sample in memory; its progress bar is left out."""
        settings = KMeansSettings(k=self.k, iterations=_KMEANS_ITERATIONS, restarts=1)
        deque(run_restarts(KMeansRun(), Steps(self.rows, self.k, settings, memory=1 << 40), settings), maxlen=0)

    def bare(self) -> None:
        """`bare_kmeans`."""
        bare_kmeans(self.rows, self.k, _KMEANS_ITERATIONS)


def clustering(dim: int) -> Clustering:
    """Normal rows of a dimension, in numbers that fit the device of FAISS."""
    floats = _KMEANS_FLOATS_ON_GPU if faiss_gpus() else _KMEANS_FLOATS
    rows = np.random.default_rng(0).standard_normal((max(floats // dim, 4 * _KMEANS_K), dim), dtype=np.float32)
    return Clustering(rows.astype(np.float16), _KMEANS_K)


def bare_kmeans(rows: NDArray[np.floating], k: int, iterations: int, restarts: int = 1) -> object:
    """`faiss.Kmeans` trained on all rows (n, dim), on all GPUs if FAISS has any."""
    count, dim = rows.shape
    kmeans = import_faiss().Kmeans(
        dim,
        k,
        niter=iterations,
        nredo=restarts,
        seed=0,
        max_points_per_centroid=math.ceil(count / k) + 1,
        min_points_per_centroid=1,
        gpu=bool(faiss_gpus()),
    )
    kmeans.train(rows)
    return kmeans
