"""finetune: a pre-trained encoder and labelled images -> a classifier, on the machinery of pre-training."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..shared.errors import UsageError
from ..shared.runtime.console import table
from ..shared.runtime.devices import choose_device
from ..shared.runtime.distributed import joined_world
from ..shared.sources.options import SourceOptions
from ..shared.storage.lock import sole_writer
from .classification.classes import labels_of, output_indices
from .classification.labelled_set import labelled_set
from .evaluation.labelled import LabelledImages, labelled_pair
from .model.shape import SIZES, Shape
from .runs.jsonl import read_lines
from .runs.loop import dry_run
from .runs.loop import train as train_run
from .runs.opening import open_run
from .runs.resume import find_resume_point
from .settings import FinetuneSettings, flat, resolve_finetuning
from .tasks.finetuning import FinetuningTask, refuse_other_labels
from .training.dry_run import RunEstimate
from .weights.checkpoint import count_parameters
from .weights.read import load_weights
from .weights.weights import Input


def finetune(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    val: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    from_scratch: bool = False,
    freeze: int | None = None,
    labels: str | Path | None = None,
    val_labels: str | Path | None = None,
    label_field: str | None = None,
    classes: str | Path | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    label_from: str | None = None,
    max_pixels: int | None = None,
    resume: str = "auto",
    device: str = "auto",
) -> Path:
    """Fine-tunes pre-trained weights for classification and returns the folder of the last checkpoint.

    Runs resume bit-identically in mid-epoch; under torchrun all processes work on one run. The last weights are the
    result: none are chosen by their accuracy on the validation images.

    Args:
        weights: A run, a checkpoint, an imported or exported folder, or a published .pth.tar. With `from_scratch` also
            vit-tiny, vit-small, vit-base or vit-large (patches of 16 pixels, 224 pixels).
        images: Labelled training images: tars, folders of tars, or folders of class folders; patterns and globs
            included.
        val: Labelled validation images of the same classes, measured during the run and at its end.
        out: Folder of the run: settings.yaml, run.json, metrics.jsonl, probe.jsonl, checkpoints/.
        recipe: Name of a shipped recipe, such as finetune-small-data, or a YAML file.
        overrides: A setting, such as model.image_size=384; repeat for more.
        from_scratch: Start from fresh weights of the same shape, as a control; the same as model.from_scratch.
        freeze: Leave the embedding and so many of the first blocks as they are; the same as model.freeze.
        labels: File of the training images' labels: a number or name a line in the sorted order of the images, or a CSV
            or JSON lines with a key column.
        val_labels: The same for the validation images.
        label_field: Field of the tars' JSON members that holds the label; of a file of labels, its label column.
        classes: File of class names, for class numbers beside names: line i, counted from 0, is the name of class i.
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        label_from: auto, or tar: the class of a tar's images is the name of the tar.
        max_pixels: Most pixels of an image (default: 178,956,970).
        resume: auto resumes the run in OUT from its newest whole checkpoint, if there is one; never refuses to.
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Raises:
        UsageError for settings that do not fit together or differ from those of the run to resume, DataError for
        weights or images that cannot be read, images without labels or of unknown classes, or a loss that is not
        finite, Interrupted after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    options = SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from)
    read_pair = partial(
        labelled_pair,
        images,
        val,
        options,
        labels=labels,
        val_labels=val_labels,
        label_field=label_field,
        classes=classes,
    )
    settings, shape = _settings(weights, recipe, overrides, from_scratch, freeze)
    given = {"weights": weights, "images": images, "val": val, "resume": resume, "out": out}
    device, out = choose_device(device), Path(out)
    with joined_world(device, {**given, **flat(settings)}) as world, sole_writer(out, world):
        task = world.all_or_raise(lambda: _task(settings, shape, *read_pair()))
        world.refuse_differences({"the images or labels of --images": task.images.labels_sha256})
        point = world.on_rank_zero(
            lambda: find_resume_point(
                out,
                resume,
                task.name,
                settings,
                FinetuneSettings(),
                lambda before: refuse_other_labels(out, before, task.images),
            )
        )
        run = open_run(task, out, point, None if settings.model.from_scratch else weights, device, world)
        with run.logbook:
            path = train_run(run)
        if world.is_first:
            show_finetuning(path)
    return path


def finetune_dry_run(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    val: str | Path | Sequence[str | Path],
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    from_scratch: bool = False,
    freeze: int | None = None,
    labels: str | Path | None = None,
    val_labels: str | Path | None = None,
    label_field: str | None = None,
    classes: str | Path | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    label_from: str | None = None,
    max_pixels: int | None = None,
    device: str = "auto",
) -> RunEstimate:
    """Estimates the steps, FLOPs, memory and time of a run, from ten measured steps. Nothing is written.

    Args:
        weights: As for `finetune`.
        images: As for `finetune`.
        val: As for `finetune`.
        recipe: As for `finetune`.
        overrides: As for `finetune`.
        from_scratch: As for `finetune`.
        freeze: As for `finetune`.
        labels: As for `finetune`.
        val_labels: As for `finetune`.
        label_field: As for `finetune`.
        classes: As for `finetune`.
        key_until: As for `finetune`.
        key_prefix: As for `finetune`.
        image_field: As for `finetune`.
        label_from: As for `finetune`.
        max_pixels: As for `finetune`.
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Raises:
        UsageError and DataError as `finetune` does.
    """
    options = SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from)
    read_pair = partial(
        labelled_pair,
        images,
        val,
        options,
        labels=labels,
        val_labels=val_labels,
        label_field=label_field,
        classes=classes,
    )
    settings, shape = _settings(weights, recipe, overrides, from_scratch, freeze)
    given = {"weights": weights, "images": images, "val": val}
    device = choose_device(device)
    with joined_world(device, {**given, **flat(settings)}) as world:
        task = world.all_or_raise(lambda: _task(settings, shape, *read_pair()))
        return dry_run(task, world, device)


def _settings(
    weights: str | Path, recipe: str | Path | None, overrides: Sequence[str], from_scratch: bool, freeze: int | None
) -> tuple[FinetuneSettings, Shape]:
    """The settings, and the shape of the weights."""
    asked = [*overrides, *(["model.from_scratch=true"] if from_scratch else [])]
    asked += [] if freeze is None else [f"model.freeze={freeze}"]
    size = SIZES.get(str(weights).removeprefix("vit-")) if str(weights).startswith("vit-") else None
    if size is not None and not Path(weights).exists():
        shape, model_input = Shape(*size, patch_size=16, image_size=224, k=0), Input()
        settings = resolve_finetuning(recipe, asked, shape.image_size, model_input.to_json())
        if not settings.model.from_scratch:
            raise UsageError(f"WEIGHTS {weights} is the name of a model; add --from-scratch, or give weights.")
        return settings, shape
    loaded = load_weights(weights)
    return resolve_finetuning(recipe, asked, loaded.shape.image_size, loaded.input.to_json()), loaded.shape


def _task(settings: FinetuneSettings, shape: Shape, train: LabelledImages, val: LabelledImages) -> FinetuningTask:
    images = labelled_set(train.records, settings.model.classes)
    classes = output_indices(labels_of(val.records), images.names)
    return FinetuningTask(settings, shape, images, val.records, torch.from_numpy(classes))


def show_finetuning(checkpoint: Path) -> None:
    """Prints a summary of the run that a checkpoint belongs to."""
    table("Fine-tuning", _summary(checkpoint))


def _summary(checkpoint: Path) -> list[tuple[str, str]]:
    out = checkpoint.parents[1]
    record: dict[str, Any] = json.loads((out / "run.json").read_text())
    lines, evaluations = read_lines(out / "metrics.jsonl"), read_lines(out / "probe.jsonl")
    last = lines[-1]
    start = record["init"]
    rows = [
        ("started from", start["file"] if start else "fresh weights"),
        ("images", f"{record['images']:,} of {len(record['class_names']):,} classes, {last['epoch']:g} epochs"),
        ("parameters", f"{count_parameters(checkpoint):,}"),
    ]
    done = [line["loss"] for line in lines if line["loss"] is not None]
    rows += [("training loss", f"{done[0]:.3f} -> {done[-1]:.3f}")] if done else []
    if evaluations:
        accuracy = evaluations[-1]
        rows.append(("validation", f"top-1 {accuracy['top1']:.2%}, top-5 {accuracy['top5']:.2%} (last weights)"))
    return [*rows, ("checkpoint", str(checkpoint))]
