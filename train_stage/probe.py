"""probe: measures frozen features by classifiers on them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..shared.runtime.console import progress, results
from ..shared.runtime.devices import choose_device, choose_workers
from ..shared.sources.options import SourceOptions
from .evaluation.base import FrozenEvaluation
from .evaluation.embed import (
    PRETRAINED,
    Execution,
    extract_features,
    fresh_weights,
    pixel_encoder,
    pooled_encoder,
)
from .evaluation.labelled import LabelledImages, labelled_pair
from .probing.attentive import AttentiveProbe
from .probing.best_block import BlockChoice, choose_block, parse_block
from .probing.knn import KS, KNearestNeighbours
from .probing.linear_probe import LinearProbe
from .probing.low_shot import LowShot
from .probing.rankme import RankMe
from .probing.result import ProbeResult, show_tables
from .weights.read import load_weights
from .weights.weights import Weights

PIXELS = 32
"""Side of the images whose raw pixels are probed for comparison."""


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
    low_shot: Sequence[str] = (),
    rankme: bool = False,
    everything: bool = False,
    block: str | int = "last",
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
    """Measures frozen features with classifiers on them, on images that no choice was made on.

    The features are the model's pooled output: the mean over patches of the final norm's output.

    - Linear probe: multinomial logistic regression on standardised features (L-BFGS).
    - k-NN: votes by cosine of features centred by the training mean (SimpleShot, arXiv 1911.04623), with k = 20 and
      temperature 0.07 (DINO, arXiv 2104.14294); also for k of 10, 20, 100 and 200, centred and not (DINOv2, arXiv
      2304.07193).
    - Attentive probe: one learned query attends to the patches, then a linear classifier (CAPI, arXiv 2502.08769).
    - Low-shot: the linear probe on a class-balanced part of the labels.
    - RankMe: effective rank of the features, without labels (arXiv 2210.02885).

    Every hyper-parameter is chosen on a tenth of the training images (of the part, for low-shot) and measured once on
    the validation images. Patch features of the attentive probe lie in the temporary folder: 2 bytes a number.

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
        low_shot: Also fit the linear probe to this share of the labels, such as 1% or 10%: as many images of each
            class, at least one.
        rankme: Also compute RankMe, the effective rank of the features.
        everything: All of `attentive`, `rankme` and `low_shot` of 1% and 10%.
        block: Block whose features are measured: last, a number from 0 (negative: from the end), or best: the one that
            does best in the linear probe on a tenth of the training images. The model's final norm follows each block.
        iterations: Steps of the attentive probe (default: 11 passes over the training images, from 500 to 12,500
            steps).
        iteration_batch: Images per step of the attentive probe (default: a fiftieth of the training images, from 32 to
            1,024).
        seed: Of the attentive probe's initial weights and its order of images, and of the images of `low_shot`.
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
        DataError if the weights or images cannot be read, images have no labels, the classes of the two sets do not
        fit, or the temporary folder has too little room; UsageError if CUDA is asked for and is not there, or for a
        block or share that does not exist.
    """
    device_name = choose_device(device)
    evaluations = _evaluations(attentive or everything, iterations, iteration_batch, seed)
    shares = [*low_shot, *(("1%", "10%") if everything else ())]
    evaluations += [LowShot.parse(share, seed) for share in dict.fromkeys(shares)]
    evaluations += [RankMe()] if rankme or everything else []
    loaded = load_weights(weights)
    models = {PRETRAINED: loaded, **({"random init": fresh_weights(loaded)} if random_init else {})}
    number = parse_block(block, loaded.shape.depth)
    options = SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from)
    train_images, val_images = labelled_pair(
        images, val, options, labels=labels, val_labels=val_labels, label_field=label_field, classes=classes
    )
    execution = Execution(batch_size, choose_workers(workers, device_name), device_name)
    choices = {name: _choose(model, name, train_images, execution) for name, model in models.items() if number is None}
    encoders = [
        pooled_encoder(model, device_name, name, choices[name].block if name in choices else number)
        for name, model in models.items()
    ]
    encoders += [pixel_encoder(PIXELS)] if pixels else []
    with progress("extracting features", len(train_images) + len(val_images)) as advance:
        extracted = extract_features(
            encoders,
            loaded.preprocess,
            train_images,
            val_images,
            replace(execution, advance=advance),
            patches=any(evaluation.reads_patches for evaluation in evaluations),
        )
    return [
        ProbeResult.of(features, [evaluation.measure(features) for evaluation in evaluations], choices)
        for features in extracted
    ]


def _evaluations(
    attentive: bool, iterations: int | None, iteration_batch: int | None, seed: int
) -> list[FrozenEvaluation]:
    """The evaluations in the order of the table's columns."""
    attentive_probes = [AttentiveProbe(iterations, iteration_batch, seed=seed)] if attentive else []
    neighbours = [KNearestNeighbours(compared=KS), KNearestNeighbours(centred=False, compared=KS)]
    return [LinearProbe(), *attentive_probes, *neighbours]


def _choose(weights: Weights, name: str, train: LabelledImages, execution: Execution) -> BlockChoice:
    with progress(f"extracting features of each block, {name}", len(train)) as advance:
        return choose_block(weights, train, replace(execution, advance=advance))


def show(rows: Sequence[ProbeResult], *, as_json: bool = False) -> None:
    """Prints the accuracies as tables, or everything with its protocols as one JSON object."""
    if as_json:
        results.print_json({"rows": [row.to_json() for row in rows]})
    else:
        show_tables(rows)
