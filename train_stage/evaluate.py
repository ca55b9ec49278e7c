"""evaluate: what a fine-tuned classifier achieves on labelled images."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..shared.images.views import Preprocess
from ..shared.report.render import say_page
from ..shared.runtime.console import foreign, progress, results, say, table
from ..shared.runtime.devices import choose_device, choose_workers, refuse_many_processes
from ..shared.sources.options import SourceOptions
from ..shared.sources.sources import shown_images
from ..shared.storage.files import refuse_folder
from ..shared.storage.lock import sole_writer
from .classification.classes import labels_of
from .classification.logits import classify, evaluation_preprocess
from .evaluation.base import EvaluationResult
from .evaluation.embed import Execution
from .evaluation.labelled import labelled_images
from .scoring.classifier import is_numbered, load_classifier, with_output_names
from .scoring.measures import BINS, CalibrationBin, ClassAccuracy, Confusion, Scores
from .scoring.page import write_classifier_page
from .scoring.real_labels import RealLabels, read_real_labels
from .scoring.targets import Outputs, all_outputs, listed_outputs, target_positions

_SHOWN_CLASSES = 20
_AGREEMENT = 0.5
"""If fewer of the images have a label that is one of their ReaL labels, a message says so."""


@dataclass(frozen=True)
class ClassifierResult:
    """What a classifier achieves on labelled images."""

    evaluation: EvaluationResult
    """Numbers with their protocol: top1, top5, ece (expected calibration error, in [0, 1]), nll (mean cross-entropy in
    nats), brier (in [0, 2]) and, with ReaL labels, real."""
    classes: tuple[ClassAccuracy, ...]
    """Of each class that has images, in the order of the outputs."""
    confusions: tuple[Confusion, ...]
    """Pairs of classes that are confused, the most frequent first."""
    calibration: tuple[CalibrationBin, ...]
    """Accuracy by confidence, in bins of equal width."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        lists = {
            name: [asdict(one) for one in getattr(self, name)] for name in ("classes", "confusions", "calibration")
        }
        return {**self.evaluation.to_json(), **lists}


def evaluate(
    weights: str | Path,
    val: str | Path | Sequence[str | Path],
    *,
    labels: str | Path | None = None,
    label_field: str | None = None,
    classes: str | Path | None = None,
    class_subset: str | Path | None = None,
    real: str | Path | None = None,
    html: str | Path | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    label_from: str | None = None,
    max_pixels: int | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    device: str = "auto",
) -> ClassifierResult:
    """Measures a fine-tuned classifier: top-1, top-5, each class, calibration, and which classes are confused.

    The shorter side of an image is resized to floor(size / 0.9) pixels, or by the share that the weights state, by
    their filter, which is bicubic by default; then the centre is cropped. The calibration error has 15 bins of equal
    width (Guo et al. 2017, arXiv 1706.04599); the Brier score sums over outputs.

    Args:
        weights: A run of finetune, a checkpoint, an imported or exported folder, or a published fine-tuned .pth.tar.
        val: Labelled images, whose classes are joined with the outputs by name: tars, folders of tars, or folders of
            class folders; patterns and globs included.
        labels: File of the images' labels: a number or name a line in the sorted order of the images, or a CSV or JSON
            lines with a key column.
        label_field: Field of the tars' JSON members that holds the label; of a file of labels, its label column.
        classes: File of class names, for images with class numbers: line i, counted from 0, is the name of class i. If
            the outputs have no names but numbers, they get these as well.
        class_subset: File with the name or number of one output a line: predictions are made among these alone, as for
            ImageNet-R and ImageNet-A.
        real: JSON file of ReaL labels, such as real.json of ImageNet: a list of output numbers for each image, in the
            order of their file names. Images with an empty list are left out of that accuracy.
        html: Also write a page to look at: one file that needs no network.
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        label_from: auto, or tar: the class of a tar's images is the name of the tar.
        max_pixels: Most pixels of an image (default: 178,956,970).
        batch_size: Images per forward pass.
        workers: Processes that decode images (default: none on the CPU, up to 16 on CUDA).
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Raises:
        DataError if weights or images cannot be read, the weights have no head, or labels are missing or none of the
        outputs; UsageError for options that do not fit.
    """
    refuse_many_processes()
    if html is not None:
        refuse_folder(Path(html), "--html", "evaluation.html")
    device_name = choose_device(device)
    loaded = load_classifier(weights)
    loaded = with_output_names(loaded, classes if is_numbered(loaded) else None)
    outputs = all_outputs(loaded) if class_subset is None else listed_outputs(loaded, class_subset)
    with nullcontext() if html is None else sole_writer(Path(html), option="--html"):
        options = SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from)
        records = labelled_images(val, options, labels=labels, label_field=label_field, classes=classes).records
        targets = target_positions(labels_of(records), outputs, shown_images(val))
        accepted = None if real is None else read_real_labels(real, records, loaded.classes)
        with progress("evaluating", len(records)) as advance:
            execution = Execution(batch_size, choose_workers(workers, device_name), device_name, advance)
            logits = classify(loaded, records, execution)
        scores = Scores(logits[:, list(outputs.indices)], targets, outputs.names)
        result = _result(scores, outputs, accepted, real)
        if html is not None:
            preprocess = evaluation_preprocess(loaded)
            title = _title(Path(weights))
            write_classifier_page(Path(html), title, result.evaluation.to_json(), scores, records, preprocess)
            say_page(Path(html))
    return result


def _result(scores: Scores, outputs: Outputs, accepted: RealLabels | None, real: str | Path | None) -> ClassifierResult:
    numbers, protocol = scores.numbers(), _protocol(outputs, len(scores.targets))
    if accepted is not None:
        in_head = scores.targets.new_tensor(outputs.indices)
        numbers["real"] = accepted.accuracy(in_head[scores.predicted])
        agreement = accepted.accuracy(in_head[scores.targets])
        protocol["real"] = {"file": str(real), "images": accepted.images, "labels_among_them": agreement}
        if agreement < _AGREEMENT:
            say(
                f"Only {agreement:.1%} of the labels are among the ReaL labels of their image; are {real} and the "
                "outputs numbered alike, and is it of these images?"
            )
    return ClassifierResult(
        EvaluationResult("classifier", protocol, numbers),
        tuple(scores.by_class()),
        tuple(scores.confusions()),
        tuple(scores.bins()),
    )


def _protocol(outputs: Outputs, images: int) -> dict[str, Any]:
    weights = outputs.weights
    return {
        "weights": {"file": str(weights.file), "sha256": weights.sha256()},
        "images": images,
        "preprocess": evaluation_preprocess(weights).to_json(),
        "outputs": len(outputs.indices),
        "outputs_of_the_head": weights.classes,
        "class_subset": None if outputs.file is None else str(outputs.file),
        "ece": f"{BINS} bins of equal width of the predicted class's probability",
        "brier": "mean over images of the sum over outputs of (probability - target)^2",
    }


def _title(weights: Path) -> str:
    """What the page calls the weights."""
    return weights.absolute().name


def show(result: ClassifierResult, *, as_json: bool = False) -> None:
    """Prints a result as tables, or as JSON."""
    if as_json:
        results.print_json(result.to_json())
        return
    table("Evaluation", _summary(result))
    results.print(_class_table(result.classes))
    results.print(_calibration_table(result.calibration))


def _summary(result: ClassifierResult) -> list[tuple[str, str]]:
    protocol, numbers = result.evaluation.protocol, result.evaluation.numbers
    of_head = protocol["outputs_of_the_head"]
    among = f"{protocol['outputs']:,} outputs" + (
        "" if protocol["class_subset"] is None else f" of the head's {of_head:,}"
    )
    rows = [
        ("weights", protocol["weights"]["file"]),
        ("images", f"{protocol['images']:,} of {len(result.classes):,} classes, predicted among {among}"),
        ("view", _view(Preprocess.from_json(protocol["preprocess"]))),
        ("top-1", f"{numbers['top1']:.2%}"),
        ("top-5", f"{numbers['top5']:.2%}"),
    ]
    if "real" in numbers:
        rows.append(("top-1, ReaL", f"{numbers['real']:.2%} of {protocol['real']['images']:,} images"))
    return [
        *rows,
        ("calibration error", f"{numbers['ece']:.4f} (ECE, {BINS} bins of equal width)"),
        ("cross-entropy", f"{numbers['nll']:.4f} nats"),
        ("Brier score", f"{numbers['brier']:.4f}"),
    ]


def _view(view: Preprocess) -> str:
    return f"shorter side to {view.resize_size} px ({view.interpolation}), centre of {view.image_size} px"


def _class_table(classes: Sequence[ClassAccuracy]) -> Table:
    """The classes; of many, those with the lowest accuracy."""
    shown = list(classes)
    title = "Classes"
    if len(classes) > _SHOWN_CLASSES:
        shown = sorted(classes, key=lambda one: one.top1)[:_SHOWN_CLASSES]
        title = f"The {_SHOWN_CLASSES} of {len(classes):,} classes with the lowest accuracy (--json has all)"
    grid = Table(title=title)
    grid.add_column("class", overflow="fold")
    for heading in ("images", "top-1", "top-5"):
        grid.add_column(heading, justify="right")
    grid.add_column("most often taken for", overflow="fold")
    for one in shown:
        confused = "" if one.confused_with is None else f"{one.confused_with} ({one.confused_images:,})"
        grid.add_row(foreign(one.name), f"{one.images:,}", f"{one.top1:.1%}", f"{one.top5:.1%}", foreign(confused))
    return grid


def _calibration_table(bins: Sequence[CalibrationBin]) -> Table:
    grid = Table(title="Accuracy by confidence")
    for heading in ("confidence", "images", "mean confidence", "accuracy"):
        grid.add_column(heading, justify="right")
    for one in bins:
        if one.images:
            means = (f"{one.confidence:.1%}", f"{one.accuracy:.1%}")
            grid.add_row(f"{one.low:.3f} to {one.high:.3f}", f"{one.images:,}", *means)
    return grid
