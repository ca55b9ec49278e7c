"""predict: the classes that a fine-tuned classifier sees in images."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..shared.errors import UsageError
from ..shared.runtime.console import progress, results, say
from ..shared.runtime.devices import choose_device, choose_workers
from ..shared.storage.files import written_whole
from .classification.logits import classify, load_classifier, read_images
from .evaluation.embed import Execution

_SHOWN_IMAGES = 50


@dataclass(frozen=True)
class Prediction:
    """What a classifier sees in one image."""

    key: str
    file: str
    """The image file, or the tar that holds it."""
    classes: list[str]
    """The most probable classes, the best first."""
    probabilities: list[float]
    """Of these classes, among all of the model's."""
    logits: list[float] | None = None
    """Of all classes in the order of the outputs, if they were asked for."""

    def to_json(self) -> dict[str, Any]:
        content = {"key": self.key, "file": self.file, "classes": self.classes, "probabilities": self.probabilities}
        return content if self.logits is None else {**content, "logits": self.logits}


def predict(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    *,
    top: int = 5,
    logits: bool = False,
    csv: str | Path | None = None,
    crop: float | None = None,
    image_size: int | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    device: str = "auto",
) -> list[Prediction]:
    """The most probable classes of each image, by a fine-tuned classifier.

    Args:
        weights: A fine-tuned run, checkpoint, imported or exported folder, or a published fine-tuned .pth.tar.
        images: Image files, a tar, a folder, or a pattern or list of tars. Labels are not needed.
        top: How many classes per image.
        logits: With --json, add the logits of all classes.
        csv: Also write the table to this CSV file: key, file, and class_1, probability_1, class_2, ...
        crop: The centre crop's share of the resized image (default: the weights' own, or 0.9).
        image_size: Pixels; resamples the position embeddings to another grid (default: as it was).
        batch_size: Images per forward pass.
        workers: Processes that decode images (default: none on the CPU, up to 16 on CUDA).
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Raises:
        DataError if weights or images cannot be read; UsageError for options out of range.
    """
    if top < 1:
        raise UsageError(f"--top {top} must be at least 1.")
    if crop is not None and not 0 < crop <= 1:
        raise UsageError(f"--crop {crop} must be larger than 0 and at most 1.")
    if csv is not None and Path(csv).is_dir():
        raise UsageError(f"--csv {csv} is a folder; give a file, such as {Path(csv) / 'predictions.csv'}.")
    device_name = choose_device(device)
    loaded = load_classifier(weights, image_size)
    records, names = read_images(images), loaded.output_names
    with progress("predicting", len(records)) as advance:
        execution = Execution(batch_size, choose_workers(workers, device_name), device_name, advance)
        scores = classify(loaded, records, execution, crop)
    probabilities, outputs = scores.double().softmax(1).topk(min(top, len(names)), dim=1)
    predictions = [
        Prediction(
            record.key,
            str(record.path),
            [names[output] for output in outputs[at].tolist()],
            probabilities[at].tolist(),
            scores[at].tolist() if logits else None,
        )
        for at, record in enumerate(records)
    ]
    if csv is not None:
        _write_csv(Path(csv), predictions)
    return predictions


def _write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    count = len(predictions[0].classes)
    heading = [name for rank in range(1, count + 1) for name in (f"class_{rank}", f"probability_{rank}")]
    with written_whole(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "file", *heading])
        for prediction in predictions:
            pairs = zip(prediction.classes, prediction.probabilities, strict=True)
            writer.writerow([prediction.key, prediction.file, *(value for pair in pairs for value in pair)])
    say(f"{path} has the predictions of {len(predictions):,} images.")


def show(predictions: Sequence[Prediction], *, as_json: bool = False) -> None:
    """Prints predictions as a table, or as one JSON line per image."""
    if as_json:
        for prediction in predictions:
            print(json.dumps(prediction.to_json()))
        return
    grid = Table(title="Predictions")
    grid.add_column("image", overflow="fold")
    for rank in range(1, min(len(predictions[0].classes), 3) + 1):
        grid.add_column(f"{rank}.")
    for prediction in predictions[:_SHOWN_IMAGES]:
        best = list(zip(prediction.classes, prediction.probabilities, strict=True))[:3]
        grid.add_row(prediction.key, *(f"{name} {probability:.1%}" for name, probability in best))
    results.print(grid)
    if len(predictions) > _SHOWN_IMAGES:
        say(f"The first {_SHOWN_IMAGES} of {len(predictions):,} images; --csv or --json gives all of them.")
