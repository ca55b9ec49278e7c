"""predict: the classes that a fine-tuned classifier sees in images, labelled or not."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from csv import writer
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..shared.errors import DataError, UsageError
from ..shared.images.on_error import skips
from ..shared.runtime.console import foreign, progress, results, say
from ..shared.runtime.devices import choose_device, choose_workers, refuse_many_processes
from ..shared.sources.keys import Skipped
from ..shared.sources.options import SourceOptions
from ..shared.sources.passed import count_of
from ..shared.sources.records import ImageRecord
from ..shared.sources.sources import read_records, shown_images
from ..shared.storage.files import refuse_folder, written_whole
from ..shared.storage.lock import sole_writer
from .classification.logits import LogitsBatch, logits_by_batch
from .evaluation.embed import Execution
from .scoring.classifier import load_classifier, with_output_names
from .weights.weights import Weights

_SHOWN_IMAGES, _SHOWN_CLASSES, _SHOWN_SKIPPED = 50, 5, 10


@dataclass(frozen=True)
class PredictedClass:
    """One of the most probable classes of an image."""

    name: str
    """Its class name; the output's number where the weights carry no names."""
    output: int
    """The number of its output, from 0."""
    probability: float
    """Softmax over all outputs, in [0, 1]."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image."""

    key: str
    file: str
    """The image file, or the tar that holds it."""
    classes: tuple[PredictedClass, ...]
    """The most probable first."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {"key": self.key, "file": self.file, "classes": [asdict(one) for one in self.classes]}


def predict(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    *,
    top: int = 5,
    csv: str | Path | None = None,
    classes: str | Path | None = None,
    on_error: str = "stop",
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    max_pixels: int | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    device: str = "auto",
) -> list[Prediction]:
    """Predicts the most probable classes of each image with a fine-tuned classifier.

    The shorter side of an image is resized to floor(size / 0.9) pixels, or by the share that the weights state, by
    their filter, which is bicubic by default; then the centre is cropped.

    Args:
        weights: A run of finetune, a checkpoint, an imported or exported folder, or a published fine-tuned .pth.tar.
        images: Tars, folders of tars, or folders of images; patterns and globs included. Labels are not needed.
        top: How many classes per image.
        csv: Also write a CSV file: key, file, class_1, probability_1, class_2, ...
        classes: File of class names, for weights that carry none: line i, counted from 0, is the name of output i.
        on_error: At an unreadable image, stop, or skip it (it is counted and listed).
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        max_pixels: Most pixels of an image (default: 178,956,970).
        batch_size: Images per forward pass.
        workers: Processes that decode images (default: none on the CPU, up to 16 on CUDA).
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Returns:
        One prediction per image that could be read, in the order of the source.

    Raises:
        DataError if weights or images cannot be read, or the weights have no head; UsageError for options that do not
        fit.
    """
    refuse_many_processes()
    if top < 1:
        raise UsageError(f"--top {top} must be at least 1.")
    if csv is not None:
        refuse_folder(Path(csv), "--csv", "predictions.csv")
    skip, device_name = skips(on_error), choose_device(device)
    loaded = with_output_names(load_classifier(weights), classes)
    options = SourceOptions(key_until, key_prefix, image_field, max_pixels)
    with nullcontext() if csv is None else sole_writer(Path(csv), option="--csv"):
        skipped: Skipped = []
        records = read_records(images, skipped if skip else None, options, unlabelled=[])
        with progress("predicting", len(records)) as advance:
            execution = Execution(batch_size, choose_workers(workers, device_name), device_name, advance)
            predictions = list(_predictions(loaded, records, execution, top, skipped, skip=skip))
        _say_skipped(skipped)
        if not predictions:
            raise DataError(f"None of the images in {shown_images(images)} could be read; give other images.")
        if csv is not None:
            _write_csv(Path(csv), predictions)
    return predictions


def _predictions(
    weights: Weights, records: Sequence[ImageRecord], execution: Execution, top: int, skipped: Skipped, *, skip: bool
) -> Iterator[Prediction]:
    """The predictions of each image; (key, reason) of those that cannot be read are added to `skipped`."""
    for batch in logits_by_batch(weights, records, execution, skip=skip):
        skipped += batch.skipped
        yield from _most_probable(batch, weights.output_names, top)


def _most_probable(batch: LogitsBatch, names: Sequence[str], top: int) -> Iterator[Prediction]:
    probabilities, outputs = batch.logits.double().softmax(1).topk(min(top, len(names)), dim=1)
    for record, row, places in zip(batch.records, probabilities.tolist(), outputs.tolist(), strict=True):
        pairs = zip(places, row, strict=True)
        classes = tuple(PredictedClass(names[output], output, probability) for output, probability in pairs)
        yield Prediction(record.key, str(record.path), classes)


def _say_skipped(skipped: Skipped) -> None:
    if skipped:
        more = f", the first {_SHOWN_SKIPPED} of which are" if len(skipped) > _SHOWN_SKIPPED else ""
        say(f"Skipped {count_of(len(skipped), 'unreadable image')}{more}:")
        for key, reason in skipped[:_SHOWN_SKIPPED]:
            say(f"  {key}: {reason}")


def _write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    ranks = range(1, len(predictions[0].classes) + 1)
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="replace") as file:
        table = writer(file)
        table.writerow(["key", "file", *(name for rank in ranks for name in (f"class_{rank}", f"probability_{rank}"))])
        for prediction in predictions:
            pairs = (value for one in prediction.classes for value in (one.name, one.probability))
            table.writerow([prediction.key, prediction.file, *pairs])
    say(f"{path} has the predictions of {len(predictions):,} images.")


def show(predictions: Sequence[Prediction], *, as_json: bool = False) -> None:
    """Prints predictions as a table, or as one line of JSON per image."""
    if as_json:
        for prediction in predictions:
            results.print_json(prediction.to_json(), indent=None)
        return
    grid = Table(title="Predictions")
    grid.add_column("image", overflow="fold")
    for rank in range(1, min(len(predictions[0].classes), _SHOWN_CLASSES) + 1):
        grid.add_column(f"{rank}.", overflow="fold")
    for prediction in predictions[:_SHOWN_IMAGES]:
        best = (f"{one.name} {one.probability:.1%}" for one in prediction.classes[:_SHOWN_CLASSES])
        grid.add_row(foreign(prediction.key), *map(foreign, best))
    results.print(grid)
    if len(predictions) > _SHOWN_IMAGES:
        say(f"These are {_SHOWN_IMAGES} of {len(predictions):,} images; --csv FILE or --json gives all of them.")
