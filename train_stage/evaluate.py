"""evaluate: what a fine-tuned classifier achieves on labelled images."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ..shared.errors import UsageError
from ..shared.images.sources import read_records
from ..shared.report.render import write_page
from ..shared.runtime.console import progress, results, say, table
from ..shared.runtime.devices import choose_device, choose_workers
from .classification.classes import class_indices, labels_of, read_class_list, subset_indices
from .classification.logits import classify, evaluation_preprocess, load_classifier
from .classification.measures import (
    CalibrationBin,
    ClassAccuracy,
    calibration,
    confusion_matrix,
    confusions,
    loss_of,
    per_class,
    top_k,
)
from .classification.real_labels import read_real_labels
from .evaluation.embed import Execution

_SHOWN_CLASSES, _MOST_IN_MATRIX = 10, 100


@dataclass(frozen=True)
class ClassifierResult:
    """What a classifier achieves. Accuracies lie in [0, 1]."""

    weights: str
    sha256: str
    """Of the file of the weights."""
    images: int
    top1: float
    top5: float
    loss: float
    """Mean cross-entropy in nats."""
    calibration_error: float
    """Expected calibration error over 15 bins of confidence, in [0, 1]."""
    bins: list[CalibrationBin]
    real: float | None
    """Top-1 against the ReaL labels, over the images that have any; None without them."""
    classes: list[ClassAccuracy]
    """Of the classes that have images, in the order of the outputs."""
    confusions: list[dict[str, Any]]
    """Pairs of classes that are confused, the most frequent first."""
    protocol: dict[str, Any]
    """Preprocessing, and the number of outputs that were chosen from."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    weights: str | Path,
    val: str | Path | Sequence[str | Path],
    *,
    classes: str | Path | None = None,
    real: str | Path | None = None,
    html: str | Path | None = None,
    crop: float | None = None,
    image_size: int | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    device: str = "auto",
) -> ClassifierResult:
    """Measures a fine-tuned classifier: top-1, top-5, every class, calibration, and which classes are confused.

    Args:
        weights: A fine-tuned run, checkpoint, imported or exported folder, or a published fine-tuned .pth.tar.
        val: Labelled images: a tar, a folder of class folders, or a pattern or list of tars.
        classes: Text file with one class name or output number per line; predictions are made among these alone, as
            robustness sets of 200 of the 1,000 classes ask for. Numbered labels are outputs if all are in the list,
            else positions in it.
        real: JSON file of ReaL labels: a list of lists of outputs in the order of the sorted keys, or an object from key
            to such a list. Images with an empty list are left out.
        html: Also write a page with the table of classes, the confusion matrix and the calibration.
        crop: The centre crop's share of the resized image (default: the weights' own, or 0.9).
        image_size: Pixels; resamples the position embeddings to another grid (default: as it was).
        batch_size: Images per forward pass.
        workers: Processes that decode images (default: none on the CPU, up to 16 on CUDA).
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Raises:
        DataError if weights or images cannot be read, images have no label, or one that the model does not have;
        UsageError for options out of range.
    """
    refuse_crop(crop)
    if html is not None and Path(html).is_dir():
        raise UsageError(f"--html {html} is a folder; give a file, such as {Path(html) / 'evaluation.html'}.")
    device_name = choose_device(device)
    loaded = load_classifier(weights, image_size)
    records, names = read_records(val), loaded.output_names
    labels = labels_of(records, val)
    if classes is None:
        outputs, indices = list(range(len(names))), class_indices(labels, names, val)
    else:
        outputs = read_class_list(classes, names)
        indices = subset_indices(labels, names, outputs, val)
    truth, chosen = torch.from_numpy(indices), [names[output] for output in outputs]
    accepted = None if real is None else read_real_labels(real, [record.key for record in records], len(names))
    with progress("evaluating", len(records)) as advance:
        execution = Execution(batch_size, choose_workers(workers, device_name), device_name, advance)
        logits = classify(loaded, records, execution, crop)[:, outputs]
    error, bins = calibration(logits, truth)
    result = ClassifierResult(
        weights=str(loaded.file),
        sha256=loaded.sha256(),
        images=len(records),
        top1=top_k(logits, truth, 1).double().mean().item(),
        top5=top_k(logits, truth, 5).double().mean().item(),
        loss=loss_of(logits, truth),
        calibration_error=error,
        bins=bins,
        real=None if accepted is None else _real_accuracy([outputs[at] for at in logits.argmax(1).tolist()], accepted),
        classes=per_class(logits, truth, chosen),
        confusions=confusions(logits, truth, chosen),
        protocol={"preprocess": evaluation_preprocess(loaded, crop).to_json(), "outputs": len(outputs)},
    )
    if html is not None:
        matrix = confusion_matrix(logits, truth, len(chosen)) if len(chosen) <= _MOST_IN_MATRIX else None
        _write_page(Path(html), result, None if matrix is None else {"names": chosen, "counts": matrix})
    return result


def refuse_crop(crop: float | None) -> None:
    """Raises UsageError unless `crop` is a share of an image."""
    if crop is not None and not 0 < crop <= 1:
        raise UsageError(f"--crop {crop} must be larger than 0 and at most 1.")


def _real_accuracy(predicted: Sequence[int], accepted: Sequence[set[int]]) -> float:
    right = [output in outputs for output, outputs in zip(predicted, accepted, strict=True) if outputs]
    return sum(right) / len(right)


def _write_page(path: Path, result: ClassifierResult, matrix: dict[str, Any] | None) -> None:
    data = {"result": result.to_json(), "matrix": matrix}
    write_page(path, "classifier", title=f"mapet: {Path(result.weights).parent.name or result.weights}", data=data)
    say(f"The page is {path}; it opens in any browser, without a network.")


def show(result: ClassifierResult, *, as_json: bool = False) -> None:
    """Prints a result as tables, or as JSON."""
    if as_json:
        print(json.dumps(result.to_json()))
        return
    rows = [
        ("weights", result.weights),
        (
            "images",
            f"{result.images:,}, of {len(result.classes):,} classes; {result.protocol['outputs']:,} to choose from",
        ),
        ("top-1", f"{result.top1:.2%}"),
        ("top-5", f"{result.top5:.2%}"),
        *([] if result.real is None else [("top-1, ReaL labels", f"{result.real:.2%}")]),
        ("cross-entropy", f"{result.loss:.4f}"),
        ("calibration error", f"{result.calibration_error:.4f} (15 bins)"),
    ]
    table("Evaluation", rows)
    worst = sorted(result.classes, key=lambda entry: entry.top1)[:_SHOWN_CLASSES]
    every = len(worst) == len(result.classes)
    grid = Table(title="Accuracy by class" if every else f"The {len(worst)} classes with the lowest accuracy")
    for heading in ("class", "images", "top-1", "top-5"):
        grid.add_column(heading, justify="left" if heading == "class" else "right")
    for entry in worst:
        grid.add_row(entry.name, f"{entry.images:,}", f"{entry.top1:.1%}", f"{entry.top5:.1%}")
    results.print(grid)
    for pair in result.confusions[:3]:
        say(f"{pair['images']} images of {pair['class']} are taken for {pair['predicted']}.")
