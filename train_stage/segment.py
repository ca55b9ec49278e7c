"""segment: measures semantic segmentation with pre-trained weights."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.errors import UsageError
from ..shared.report.render import say_page
from ..shared.runtime.console import foreign, progress, results
from ..shared.runtime.devices import choose_device, choose_workers, refuse_many_processes
from ..shared.sources.options import SourceOptions
from ..shared.storage.files import refuse_folder
from ..shared.storage.lock import sole_writer
from .evaluation.embed import PRETRAINED, Execution, fresh_weights
from .segmentation import page
from .segmentation.crops import RandomCrops, WholeImages
from .segmentation.linear_head import Training, measure_heads, train_head
from .segmentation.masked_images import MaskedImage, class_pixels, masked_images, refuse_other_classes
from .segmentation.masks import MaskRule
from .segmentation.patch_classifiers import FITS, PatchNeighbours, PatchRegression
from .segmentation.patches import PatchEncoder, SquashedImages, patch_sets
from .segmentation.pixel_classifier import measure
from .segmentation.scores import Measured
from .weights.read import load_weights
from .weights.weights import Weights

HEADS = ("linear",)


@dataclass(frozen=True)
class SegmentationResult:
    """What one segmentation achieves on the validation images; figures lie in [0, 1]."""

    features: str
    """Whose features: "pre-trained" or "random init"."""
    classifier: str
    """What reads them: "logistic regression", "k-NN" or "linear head"."""
    mean_iou: float
    """Mean intersection over union of the classes that occur in the validation masks."""
    pixel_accuracy: float
    """Share of the pixels that are right, ignored ones left out."""
    iou: dict[str, float | None]
    """By the name of each class, or its index; None for one that does not occur in the validation masks."""
    protocol: dict[str, Any]
    """Everything that is needed to repeat the measurement, as plain JSON values."""

    def to_json(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "classifier": self.classifier,
            "numbers": {"mean_iou": self.mean_iou, "pixel_accuracy": self.pixel_accuracy},
            "iou": self.iou,
            "protocol": self.protocol,
        }


def segment(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    val: str | Path | Sequence[str | Path],
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (255,),
    mask_field: str = "seg.png",
    head: str | None = None,
    random_init: bool = False,
    image_size: int | None = None,
    max_patches: int = 200_000,
    iterations: int = 1_000,
    iteration_batch: int = 16,
    seed: int = 0,
    html: str | Path | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    max_pixels: int | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    device: str = "auto",
) -> list[SegmentationResult]:
    """Measures semantic segmentation with frozen features: logistic regression and k-NN of patches, or a linear head.

    Without `head`, images and masks are squashed to the model's square input (as in CAPI, arXiv 2502.08769). Logistic
    regression predicts the most frequent class of each patch, which all its pixels get; in k-NN each neighbour votes
    with its block of pixels. Hyper-parameters are chosen on a tenth of the training images, and the validation images
    are measured once. The figures are mean intersection over union (IoU) of the classes that occur in the validation
    masks, and the share of the pixels that are right.

    Args:
        weights: A run, a checkpoint, an imported or exported folder, or a published .pth.tar.
        images: Training images: tars with KEY.jpg and KEY.seg.png, or a folder images/ beside a folder annotations/
            of PNG files with the same names, such as ADE20K's images/training.
        val: The same for the validation images.
        classes: File of class names: line i, counted from 0, is the name of class index i.
        ignore: Value of pixels that are neither learned from nor measured; may be given several times, such as 0 and
            255 for ADE20K.
        mask_field: What follows the key in the name of a mask in a tar.
        head: linear: train batch normalisation and a 1x1 convolution on random crops instead, and measure them by
            sliding windows (as in DINOv3, arXiv 2508.10104).
        random_init: Also measure the same model with the initial weights of the run's seed.
        image_size: Pixels; resamples the position embeddings to another grid (default: as it was).
        max_patches: Most patches of the training images that are kept; of more, each image gives the same number, drawn
            by its key.
        iterations: Steps that a linear head is trained for; published are 40,000.
        iteration_batch: Images per step.
        seed: Of a linear head's initial weights and crops.
        html: Page to write: images with their true and predicted classes, and the IoU of each class.
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        max_pixels: Most pixels of an image (default: 178,956,970).
        batch_size: Images per forward pass.
        workers: Processes that decode images (default: none on the CPU, up to 16 on CUDA).
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Returns:
        One result per classifier for the weights, then those of the random initialisation if asked for.

    Raises:
        DataError if the weights, images or masks cannot be read, an image has no mask or one of another size, a mask is
        no PNG of one channel, holds a class without a name or only ignored pixels; UsageError for options that do not
        fit.
    """
    refuse_many_processes()
    if head is not None and head not in HEADS:
        raise UsageError(f"--head {head} is unknown; choose {' or '.join(HEADS)}.")
    path = None if html is None else Path(html)
    if path is not None:
        refuse_folder(path, "--html", "segmentation.html")
    rule = MaskRule.read(tuple(ignore), classes)
    loaded = load_weights(weights).resized(image_size)
    device_name = choose_device(device)
    execution = Execution(batch_size, choose_workers(workers, device_name), device_name)
    options = SourceOptions(key_until, key_prefix, image_field, max_pixels)
    with nullcontext() if path is None else sole_writer(path, option="--html"):
        data = _read(images, val, options, mask_field, rule, execution)
        encoders = [PatchEncoder.of(PRETRAINED, loaded, device_name)]
        if random_init:
            encoders.append(PatchEncoder.of("random init", fresh_weights(loaded), device_name))
        if head is None:
            measured = _frozen(loaded, encoders, data, max_patches, execution)
        else:
            measured = _linear_heads(loaded, encoders, data, Training(iterations, iteration_batch, seed), execution)
        if path is not None:
            page.write(path, Path(weights), measured, data.val, rule)
            say_page(path)
    return [_result(one, data) for one in measured]


@dataclass(frozen=True)
class _Data:
    """Training and validation images with their masks."""

    train: Sequence[MaskedImage]
    val: Sequence[MaskedImage]
    rule: MaskRule
    classes: int
    """Every class index is lower."""
    shown: set[str]
    """Keys of the validation images that a page shows."""


def _read(
    images: str | Path | Sequence[str | Path],
    val: str | Path | Sequence[str | Path],
    options: SourceOptions,
    mask_field: str,
    rule: MaskRule,
    execution: Execution,
) -> _Data:
    """Finds and checks all images and masks."""
    train, test = (masked_images(source, options, mask_field) for source in (images, val))
    with progress("checking masks", len(train) + len(test), "masks") as advance:
        learned, measured = (class_pixels(pairs, rule, execution.workers, advance) for pairs in (train, test))
    refuse_other_classes(learned, measured, rule)
    classes = len(rule.names) if rule.names is not None else int(np.flatnonzero(learned + measured)[-1]) + 1
    return _Data(train, test, rule, classes, {pair.image.key for pair in page.shown_images(test)})


def _frozen(
    weights: Weights, encoders: Sequence[PatchEncoder], data: _Data, most: int, execution: Execution
) -> list[Measured]:
    """Logistic regression and k-NN of each encoder's patches."""
    train, val = (SquashedImages.of(pairs, data.rule, weights) for pairs in (data.train, data.val))
    with progress("extracting features", len(data.train)) as advance:
        patches = patch_sets(encoders, train, data.classes, most, _with(execution, advance))
    with progress("fitting classifiers", FITS * len(encoders), "fits") as advance:
        fitted = [
            (encoder, (PatchRegression(of, advance), PatchNeighbours(of, advance)))
            for encoder, of in zip(encoders, patches, strict=True)
        ]
    with progress("measuring", len(data.val)) as advance:
        return measure(fitted, val, data.classes, data.shown, _with(execution, advance))


def _linear_heads(
    weights: Weights, encoders: Sequence[PatchEncoder], data: _Data, training: Training, execution: Execution
) -> list[Measured]:
    """A linear head on each encoder."""
    crops = RandomCrops(data.train, data.rule, weights.preprocess, training.seed)
    with progress("training", training.iterations * len(encoders), "steps") as advance:
        heads = [
            (encoder, train_head(encoder, crops, data.classes, training, _with(execution, advance)))
            for encoder in encoders
        ]
    whole = WholeImages(data.val, data.rule, weights.preprocess)
    with progress("measuring", len(data.val)) as advance:
        return measure_heads(heads, whole, data.classes, training, data.shown, _with(execution, advance))


def _with(execution: Execution, advance: Callable[[int], Any]) -> Execution:
    return replace(execution, advance=advance)


def _result(measured: Measured, data: _Data) -> SegmentationResult:
    scores = measured.scores
    protocol = {
        "mean_iou": "mean over the classes that occur in the validation masks",
        "ignored": list(data.rule.ignore),
        "classes": data.classes,
        **measured.protocol,
    }
    iou = {data.rule.name_of(index): value for index, value in enumerate(scores.iou)}
    return SegmentationResult(
        measured.features, measured.classifier, scores.mean_iou, scores.pixel_accuracy, iou, protocol
    )


def show(rows: Sequence[SegmentationResult], *, as_json: bool = False) -> None:
    """Prints the figures as two tables, or everything as one JSON object."""
    if as_json:
        results.print_json({"rows": [row.to_json() for row in rows]})
        return
    from rich.table import Table

    occurring = [name for name, value in rows[0].iou.items() if value is not None]
    images = rows[0].protocol["val_images"]
    grid = Table(title=f"Segmentation: {images:,} images, {len(occurring)} classes")
    for heading in ("features", "classifier", "mean IoU", "pixel accuracy"):
        grid.add_column(heading, justify="right" if heading in ("mean IoU", "pixel accuracy") else "left")
    for row in rows:
        grid.add_row(row.features, row.classifier, f"{row.mean_iou:.1%}", f"{row.pixel_accuracy:.1%}")
    results.print(grid)
    by_class = Table(title="IoU by class")
    by_class.add_column("class", overflow="fold")
    for row in rows:
        by_class.add_column(f"{row.classifier}, {row.features}", justify="right")
    for name in occurring:
        by_class.add_row(foreign(name), *(f"{row.iou[name] or 0:.1%}" for row in rows))
    results.print(by_class)
