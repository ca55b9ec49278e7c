"""probe: measures frozen features by classifiers on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shared.runtime.console import foreign, progress, results
from ..shared.runtime.devices import choose_device, choose_workers
from ..shared.sources.options import SourceOptions
from .evaluation.base import EvaluationResult, FrozenEvaluation
from .evaluation.embed import Execution, FrozenFeatures, extract_features, fresh_weights, pixel_encoder, pooled_encoder
from .evaluation.labelled import labelled_pair
from .probing.attentive import AttentiveProbe
from .probing.knn import KNearestNeighbours
from .probing.linear_probe import LinearProbe
from .weights.read import load_weights

PIXELS = 32
"""Side of the images whose raw pixels are probed for comparison."""


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 accuracies in [0, 1] on the validation images."""

    features: str
    """Whose features: "pre-trained", "random init" or "pixels 32x32"."""
    linear: float
    knn: float
    evaluations: tuple[EvaluationResult, ...] = ()
    """The same with the protocol of each evaluation."""
    attentive: float | None = None
    """None if it was not measured."""

    def to_json(self) -> dict[str, Any]:
        return {"features": self.features, "evaluations": [result.to_json() for result in self.evaluations]}


def probe(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    val: str | Path | Sequence[str | Path],
    *,
    labels: str | Path | None = None,
    val_labels: str | Path | None = None,
    label_field: str | None = None,
    classes: str | Path | None = None,
    random_init: bool = False,
    pixels: bool = False,
    attentive: bool = False,
    iterations: int | None = None,
    iteration_batch: int | None = None,
    seed: int = 0,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    label_from: str | None = None,
    max_pixels: int | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    device: str = "auto",
) -> list[ProbeResult]:
    """Measures frozen features with a linear probe and k-NN.

    The features are the model's pooled output: the mean over patches of the final norm's output. The linear probe is
    multinomial logistic regression on standardised features (L-BFGS); its weight decay is chosen on a tenth of the
    training images. k-NN votes by cosine of features centred by the training mean (SimpleShot, arXiv 1911.04623), with
    k = 20 and temperature 0.07 (DINO, arXiv 2104.14294).

    Args:
        weights: A run, a checkpoint, an imported or exported folder, or a published .pth.tar.
        images: Labelled training images: tars, folders of tars, or folders of class folders; patterns and globs
            included.
        val: Labelled validation images; their classes are joined with those of the training images by name.
        labels: File of the training images' labels: a number or name a line in the sorted order of the images, or a CSV
            or JSON lines with a key column.
        val_labels: The same for the validation images.
        label_field: Field of the tars' JSON members that holds the label; of a file of labels, its label column.
        classes: File of class names, for class numbers beside names: line i, counted from 0, is the name of class i.
        random_init: Also probe the same model with the initial weights of the run's seed.
        pixels: Also probe the raw pixels, averaged to 32x32.
        attentive: Also train the attentive probe, which reads each patch (minutes on a CPU).
        iterations: Steps of the attentive probe (default: 12,500, or 10 passes over the training images if that is
            less).
        iteration_batch: Images per step of the attentive probe (default: a hundredth of the training images, from 32
            to 1,024).
        seed: Of the attentive probe's initial weights and of its order of images.
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        label_from: auto, or tar: the class of a tar's images is the name of the tar.
        max_pixels: Most pixels of an image (default: 178,956,970).
        batch_size: Images per forward pass.
        workers: Processes that decode images (default: none on the CPU, up to 16 on CUDA).
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Returns:
        One row for the weights, then one for each of the comparisons asked for.

    Raises:
        DataError if the weights or images cannot be read, images have no labels, or the classes of the two sets do not
        fit; UsageError if CUDA is asked for and is not there.
    """
    device_name = choose_device(device)
    loaded = load_weights(weights)
    options = SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from)
    train_images, val_images = labelled_pair(
        images, val, options, labels=labels, val_labels=val_labels, label_field=label_field, classes=classes
    )
    encoders = [pooled_encoder(loaded, device_name)]
    if random_init:
        encoders.append(pooled_encoder(fresh_weights(loaded), device_name, "random init"))
    if pixels:
        encoders.append(pixel_encoder(PIXELS))
    evaluations: list[FrozenEvaluation] = [LinearProbe(), KNearestNeighbours()]
    if attentive:
        evaluations.append(AttentiveProbe(iterations, iteration_batch, seed=seed))
    with progress("extracting features", len(train_images) + len(val_images)) as advance:
        execution = Execution(batch_size, choose_workers(workers, device_name), device_name, advance)
        extracted = extract_features(
            encoders, loaded.preprocess, train_images, val_images, execution, patches=attentive
        )
    return [_row(features, evaluations) for features in extracted]


def _row(features: FrozenFeatures, evaluations: Sequence[FrozenEvaluation]) -> ProbeResult:
    measured = [evaluation.measure(features) for evaluation in evaluations]
    top1 = {result.name: result.numbers["top1"] for result in measured}
    return ProbeResult(features.encoder, top1["linear"], top1["knn"], tuple(measured), top1.get("attentive"))


_COLUMNS = {"linear": "linear probe", "attentive": "attentive probe", "knn": "k-NN"}


def show(rows: Sequence[ProbeResult], *, as_json: bool = False) -> None:
    """Prints the accuracies as a table, or everything as one JSON object."""
    if as_json:
        results.print_json({"rows": [row.to_json() for row in rows]})
        return
    from rich.table import Table

    measured = rows[0].evaluations[0].protocol["features"]
    grid = Table(
        title=f"Frozen features: top-1 on {measured['val_images']:,} images of {measured['val_classes']} classes"
    )
    grid.add_column("features")
    columns = [name for name in _COLUMNS if any(result.name == name for result in rows[0].evaluations)]
    for name in columns:
        grid.add_column(_COLUMNS[name], justify="right")
    for row in rows:
        top1 = {result.name: result.numbers["top1"] for result in row.evaluations}
        grid.add_row(foreign(row.features), *(f"{top1[name]:.1%}" for name in columns))
    results.print(grid)
