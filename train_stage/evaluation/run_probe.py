"""The probe that is made while a run goes on."""

from pathlib import Path

import torch
from torch import Tensor

from ...shared.runtime.devices import choose_workers
from ..settings import Settings
from ..weights.weights import Input, Weights
from .embed import extract_features, pooled_features
from .knn import knn
from .labelled import labelled_images, seeded_subset
from .linear_probe import linear_probe


class RunProbe:
    """Probes a run as it goes on: k-NN, and the linear probe if wanted, on seeded subsets of two labelled sets."""

    def __init__(self, settings: Settings, device: str):
        """Raises DataError if the sets cannot be read or have no labels."""
        self._settings, self._device = settings, device
        chosen = settings.probe
        sizes = (chosen.max_images, max(chosen.max_images // 4, 1))
        pairs = zip((chosen.images, chosen.val), sizes, strict=True)
        self._sources = [seeded_subset(labelled_images(source), size) for source, size in pairs]

    def measure(self, tensors: dict[str, Tensor], k: int) -> dict[str, float]:
        """Top-1 accuracies in [0, 1] of features of these weights (published names), as "knn" and "linear"."""
        settings, data = self._settings, self._settings.data
        shape, seen = settings.model.shape(k), Input(tuple(data.mean), tuple(data.std), data.interpolation)
        cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        weights = Weights(Path("the run's weights"), shape, cpu, seen, settings.train.seed)
        labels = [torch.tensor([record.label for record in records]) for records in self._sources]
        workers = choose_workers(data.workers, self._device)
        functions = [pooled_features(weights, self._device)]
        ((train, test),) = extract_features(self._sources, weights.preprocess, functions, 128, workers, self._device)
        found = {"knn": knn(train, labels[0], test, labels[1])}
        if settings.probe.linear:
            found["linear"] = linear_probe(train, labels[0], test, labels[1])
        return found
