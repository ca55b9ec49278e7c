"""The dry run of a study: its steps by kind, what they compute and how long that takes. Nothing is written."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..shared.errors import DataError, UsageError
from ..shared.printable import printable
from ..shared.runtime.console import foreign, results
from ..shared.runtime.memory import as_text
from ..shared.sources.sources import read_records
from ..tokenize_stage.kmeans.duration import comparisons
from ..tokenize_stage.kmeans.plan import PATCHES_PER_CENTROID
from ..tokenize_stage.kmeans.train import KMeansSettings
from ..train_stage.settings import FinetuneSettings, Settings
from ..train_stage.tasks.finetuning import FinetuningModel
from ..train_stage.tasks.pretraining import parameters_of
from .graph import (
    CLASSIFIER,
    CODEBOOK,
    KINDS,
    PROBE,
    RUN,
    TOKENS,
    Graph,
    Inputs,
    Step,
    build_graph,
    settings_among,
    tower_of,
)
from .schema import Study, Tokenizer, read_study

_NAMES = {CODEBOOK: "codebooks", TOKENS: "token stores", RUN: "pre-trainings", PROBE: "evaluations"}
_NAMES[CLASSIFIER] = "fine-tunings"
_UNITS = ((1e9, "G"), (1e12, "T"), (1e15, "P"), (1e18, "E"), (1e21, "Z"))
_FLOAT = 4


@dataclass(frozen=True)
class Cost:
    """What some steps amount to."""

    steps: int
    images: int
    """That pass through a model, those of all epochs and views counted."""
    flops: float
    bytes: int
    """On disk: centroids, tokens before compression, checkpoints."""
    unknown: int = 0
    """Steps whose FLOPs and bytes are not known, since their tower would have to be downloaded."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


@dataclass(frozen=True)
class StudyPlan:
    """What a study amounts to."""

    cells: int
    images: int
    """Training images."""
    kinds: Mapping[str, Cost]
    """By codebook, tokens, run, probe and classifier."""
    flops_per_second: float | None

    @property
    def total(self) -> Cost:
        """Of all steps."""
        return sum(self.kinds.values(), Cost(0, 0, 0, 0))

    def hours(self, cost: Cost) -> float | None:
        """Of one device at the given rate; None without a rate."""
        return None if self.flops_per_second is None else cost.flops / self.flops_per_second / 3600

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        rows = {**self.kinds, "total": self.total}
        return {
            "cells": self.cells,
            "images": self.images,
            "flops_per_second": self.flops_per_second,
            "steps": {kind: {**asdict(cost), "hours": self.hours(cost)} for kind, cost in rows.items()},
        }


def study_dry_run(
    study: str | Path,
    *,
    images: str | Path | None = None,
    flops_per_second: float | None = None,
) -> StudyPlan:
    """Says how many steps, images, FLOPs, hours and bytes a study amounts to, and writes nothing.

    FLOPs of towers, k-means, pre-training and fine-tuning are counted; of evaluations, the forward pass over the
    training images is counted, not the fit on frozen features. Images are decoded by the processor beside the model.

    Args:
        study: A shipped study (smoke, tiny, tiny-rows or paper-imagenet) or a YAML file.
        images: Labelled training images; not needed if the study draws its own or states train_images.
        flops_per_second: With --dry-run: floating-point operations that one device computes per second, such as 4e14,
            for the hours; mapet bench measures them.

    Returns:
        Costs by kind of step.

    Raises:
        UsageError: settings that do not fit together, or missing options.
        DataError: the study's file is wrong, or images cannot be read.
    """
    if flops_per_second is not None and not 0 < flops_per_second < math.inf:
        raise UsageError(f"--flops-per-second {flops_per_second:g} must be a positive number.")
    plan = read_study(study)
    count = _count(plan, images)
    graph = build_graph(plan, Inputs("IMAGES", "VAL", count, Path("OUT")))
    refuse_other_grids(graph)
    costs = {kind: sum(_costs(graph, kind, count), Cost(0, 0, 0, 0)) for kind in KINDS}
    return StudyPlan(len(graph.cells), count, costs, flops_per_second)


def show_plan(plan: StudyPlan, *, as_json: bool = False) -> None:
    """Prints a table, or all of it as JSON."""
    if as_json:
        results.print_json(plan.to_json())
        return
    from rich.table import Table

    grid = Table(title=f"{plan.cells} cells on {plan.images:,} training images (nothing was written)")
    grid.add_column("steps")
    for heading in ("number", "images", "FLOPs", "hours", "on disk"):
        grid.add_column(heading, justify="right", no_wrap=True)
    named = {_NAMES[kind]: cost for kind, cost in plan.kinds.items() if cost.steps}
    for name, cost in {**named, "total": plan.total}.items():
        grid.add_row(name, *_cells(plan, cost), end_section=name == list(named)[-1])
    results.print(grid)
    for sentence in _notes(plan):
        results.print(foreign(sentence))


def _cells(plan: StudyPlan, cost: Cost) -> list[str]:
    hours = plan.hours(cost)
    hours_text = "" if hours is None else f"{hours:,.1f}" if hours >= 0.1 else f"{hours:.2g}"
    return [f"{cost.steps:,}", f"{cost.images:,}", _flops_text(cost.flops), hours_text, as_text(cost.bytes)]


def _flops_text(flops: float) -> str:
    unit, letter = in_unit(flops)
    return f"{flops / unit:,.3g} {letter}" if flops < 1e6 * _UNITS[-1][0] else f"{flops:.2e}"


def _notes(plan: StudyPlan) -> list[str]:
    notes = [
        f"Hours are of one device at {plan.flops_per_second:.3g} FLOP/s, if images are decoded as fast."
        if plan.flops_per_second
        else "Hours need --flops-per-second; mapet bench measures it (step, FLOPs)."
    ]
    notes.append("Evaluations are counted as one forward pass over the training images, without the fits.")
    if plan.total.unknown:
        notes.append(f"{plan.total.unknown} steps have a tower of hf-hub, which is not downloaded: they are left out.")
    return notes


def _count(plan: Study, images: str | Path | None) -> int:
    if plan.drawings is not None:
        if images is not None:
            raise UsageError("The study draws its own images; leave out --images.")
        return plan.drawings.train
    if plan.train_images is not None:
        return plan.train_images
    if images is None:
        raise UsageError("The plan needs the number of training images: give --images, or train_images in the study.")
    return len(read_records(str(images)))


def flops_of_step(step: Step, count: int) -> int | None:
    """FLOPs of a step with `count` training images, as the plan counts them.

    Returns:
        None if they are not known: the tower is one of hf-hub, or it cannot be opened any more.
    """
    try:
        cost = _cost(step, count)
    except (DataError, UsageError):
        return None
    return None if cost.unknown else round(cost.flops)


def in_unit(most: float) -> tuple[float, str]:
    """The unit, and its letter, in which FLOPs of up to `most` are at most 1,000."""
    return next((unit for unit in _UNITS if most < 1000 * unit[0]), _UNITS[-1])


def _costs(graph: Graph, kind: str, count: int) -> list[Cost]:
    return [_cost(step, count) for step in graph.steps.values() if step.kind == kind]


def _cost(step: Step, count: int) -> Cost:
    cost: Callable[[Step, int], Cost] = {
        CODEBOOK: _of_codebook, TOKENS: _of_tokens, RUN: _of_run, PROBE: _of_probe, CLASSIFIER: _of_classifier,
    }[step.kind]  # fmt: skip
    return cost(step, count)


def _of_codebook(step: Step, count: int) -> Cost:
    tokenizer, tower = _tokenizer(step), tower_of(_tokenizer(step))
    if tokenizer.published:
        assert tower is not None  # it is one of two
        return Cost(1, 0, 0, _FLOAT * tokenizer.k * tower.dim)
    if tower is None:
        return Cost(1, 0, 0, 0, unknown=1)
    book = tokenizer.codebook
    kmeans = settings_among(KMeansSettings, book)
    images = min(count, int(book.get("max_images") or count))  # type: ignore[arg-type]
    patches = min(int(book.get("patches") or PATCHES_PER_CENTROID * kmeans.k), images * tower.patches)  # type: ignore[arg-type]
    seen = round(images * -math.expm1(-patches / images))  # images with at least one patch of the sample
    flops = seen * tower.flops + 2 * tower.dim * comparisons(patches, kmeans)
    return Cost(1, seen, flops, _FLOAT * kmeans.k * tower.dim)


def _of_tokens(step: Step, count: int) -> Cost:
    tokenizer, tower = _tokenizer(step), tower_of(_tokenizer(step))
    images = count * int(tokenizer.tokens.get("views", 1))  # type: ignore[arg-type]
    if tower is None:
        return Cost(1, images, 0, 0, unknown=1)
    flops = tower.flops + 2 * tower.patches * tower.dim * tokenizer.k
    return Cost(1, images, images * flops, images * tower.patches * (2 if tokenizer.k <= 1 << 16 else 4))


def _of_run(step: Step, count: int) -> Cost:
    settings = _settings(step)
    train, per_epoch = settings.train, count // settings.train.batch_size
    parameters = parameters_of(settings.model.shape(step.k))
    return Cost(1, step.images_seen, step.flops, _bytes_of_run(settings, parameters, train.epochs * per_epoch))


def _of_classifier(step: Step, count: int) -> Cost:
    settings, flops = step.finetuning, _flops_of_classifier(step)
    assert settings is not None  # every fine-tuning has them
    parameters = parameters_of(_settings(step).model.shape(1))
    steps = settings.train.epochs * (count // settings.train.batch_size)
    return Cost(1, step.images_seen, step.images_seen * flops, _bytes_of_run(settings, parameters, steps))


def _of_probe(step: Step, count: int) -> Cost:
    return Cost(1, count, count * _flops_of_classifier(step) // 3, 0)


def _flops_of_classifier(step: Step) -> int:
    """Of forward and backward for an image, without the last linear layer, whose classes are not known."""
    shape, finetuning = _settings(step).model.shape(1), step.finetuning
    size = shape.image_size if finetuning is None else finetuning.model.image_size
    return _classifier_flops(shape, size)


@cache
def _classifier_flops(shape: Any, image_size: int) -> int:
    settings = FinetuneSettings()
    settings.model.image_size = image_size
    return FinetuningModel(settings, shape, ("",)).flops_per_image()


def _bytes_of_run(settings: Settings | FinetuneSettings, parameters: int, steps: int) -> int:
    """Of the checkpoints that stay: weights, their average, and two moments."""
    train = settings.train
    written = -(-steps // train.checkpoint_every)
    kept = min(train.keep_last, written) + (steps // train.keep_every if train.keep_every else 0)
    return kept * _FLOAT * parameters * (3 + (train.ema is not None))


def refuse_other_grids(graph: Graph) -> None:
    """Raises DataError if a model has other patches than the tokens that it is trained on; hf-hub towers pass."""
    for cell in graph.cells:
        tower, shape = tower_of(_tokenizer(graph.steps[cell.tokens])), _settings(graph.steps[cell.run]).model.shape(1)
        side = shape.image_size // shape.patch_size
        if tower is not None and tower.grid != (side, side):
            rows, columns = tower.grid
            raise DataError(
                f"model {printable(cell.model)} has {side}x{side} patches (model.image_size / model.patch_size) and "
                f"the tokens of {printable(cell.tokenizer)} are {rows}x{columns}; change the model or the tokenizer."
            )


def _tokenizer(step: Step) -> Tokenizer:
    assert step.tokenizer is not None  # codebooks and stores have one
    return step.tokenizer


def _settings(step: Step) -> Settings:
    assert step.settings is not None  # so have runs and what reads them
    return step.settings
