"""The probe of a run's weights while it trains."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ...shared.errors import UsageError
from ...shared.runtime.devices import choose_workers
from ..evaluation.base import Evaluation, evaluate
from ..evaluation.embed import Execution
from ..evaluation.labelled import labelled_pair
from ..settings import Settings
from ..weights.weights import Input, Weights
from .knn import KNearestNeighbours
from .linear_probe import LinearProbe


class RunProbe:
    """Evaluates a run's weights by k-NN, and by the linear probe if the settings ask for it.

    Both sets of images are seeded subsets: `probe.max_images` training images, a quarter as many validation images.
    """

    def __init__(self, settings: Settings, device: str):
        """Raises UsageError if the settings name no images, DataError if they cannot be read or have no labels."""
        probe = settings.probe
        if probe.images is None or probe.val is None:
            raise UsageError("probe.images and probe.val must be set to probe a run.")
        self._settings = settings
        train, val = labelled_pair(
            probe.images,
            probe.val,
            labels=probe.labels,
            val_labels=probe.val_labels,
            label_field=probe.label_field,
            classes=probe.classes,
        )
        self._train = train.subset(probe.max_images)
        self._val = val.subset(max(probe.max_images // 4, 1))
        self._execution = Execution(workers=choose_workers(settings.data.workers, device), device=device)
        self._evaluations: list[Evaluation] = [KNearestNeighbours()]
        if probe.linear:
            self._evaluations.append(LinearProbe())

    def measure(self, tensors: Mapping[str, Tensor], k: int) -> dict[str, float]:
        """Top-1 accuracies in [0, 1] by name of the evaluation ("knn", "linear").

        Args:
            tensors: the model's weights on any device, under the published names.
            k: the number of codes that the model predicts.
        """
        data, seed = self._settings.data, self._settings.train.seed
        model_input = Input.from_json({"mean": data.mean, "std": data.std, "interpolation": data.interpolation})
        on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        weights = Weights(Path("the run's weights"), self._settings.model.shape(k), on_cpu, model_input, seed)
        results = evaluate(self._evaluations, weights, self._train, self._val, self._execution)
        return {result.name: result.numbers["top1"] for result in results}
