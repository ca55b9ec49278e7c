"""What a finished study measured: figures of each cell, and their summary over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..shared.errors import DataError
from ..train_stage.runs.jsonl import read_lines
from .graph import OUTPUT, Cell, Graph, Inputs
from .plan import flops_of_step
from .schema import Study
from .statistics import Difference, Spread, paired_difference, spread
from .work import read_result

SPLITS = (
    "Frozen evaluations choose their hyper-parameters on a tenth of the training images and measure once on VAL.",
    "Fine-tuning measures its last weights on VAL; none are chosen by it.",
    "Nothing else is chosen. Differences are paired by seed; intervals are Student's t, 95 %, not corrected for "
    "several comparisons.",
)


@dataclass(frozen=True)
class Measured:
    """A cell with its figures and its costs."""

    cell: Cell
    scores: Mapping[str, float]
    """Top-1 accuracy in [0, 1] by evaluation."""
    images: int
    """Seen in pre-training."""
    flops: int
    """Of pre-training."""
    tokenizer_flops: int | None
    """Of codebook and tokens; None if they are not known."""
    finetuning_flops: int | None
    tokenizer_seconds: float
    pretraining_seconds: float
    probe_seconds: float
    finetuning_seconds: float


@dataclass(frozen=True)
class Summary:
    """A row of the table, over seeds."""

    tokenizer: str
    model: str
    budget: str
    row: str
    scores: Mapping[str, Spread]
    differences: Mapping[str, Difference]
    """From the baseline of the same tokenizer, model and budget; empty for the baseline."""
    images: int
    flops: int
    tokenizer_flops: int | None
    finetuning_flops: int | None
    seconds: Mapping[str, float]
    """Means by what they were spent on: tokenizer, pre-training, probe, fine-tuning."""
    runs: tuple[str, ...]
    """Folders of the pre-trainings, relative to the study's."""


@dataclass(frozen=True)
class StudyResult:
    """What a study measured."""

    study: Study
    cells: list[Measured]
    summaries: list[Summary]
    root: Path

    def groups(self) -> dict[tuple[str, str, str], list[Summary]]:
        """The rows of each tokenizer, model and budget, in the order of the study."""
        groups: dict[tuple[str, str, str], list[Summary]] = {}
        for row in self.summaries:
            groups.setdefault((row.tokenizer, row.model, row.budget), []).append(row)
        return groups

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "baseline": self.study.baseline,
            "cells": [asdict(cell) for cell in self.cells],
            "summaries": [asdict(summary) for summary in self.summaries],
            "splits": list(SPLITS),
        }


def collect(study: Study, graph: Graph, inputs: Inputs) -> StudyResult:
    """The figures of a study whose steps are all done. Raises DataError for a result that cannot be read."""
    cells = [_measured(cell, graph, inputs) for cell in graph.cells]
    return StudyResult(study, cells, _summaries(study, cells), inputs.root)


def _measured(cell: Cell, graph: Graph, inputs: Inputs) -> Measured:
    root = inputs.root
    result = {folder: read_result(root, folder) for folder in (cell.probe, cell.classifier) if folder}
    scores: dict[str, float] = {}
    if cell.probe:
        scores |= result[cell.probe]["scores"][cell.features]
    if cell.classifier:
        scores |= result[cell.classifier]["scores"]["classifier"]
    run = graph.steps[cell.run]
    is_pretrained = bool(cell.budget)
    return Measured(
        cell,
        scores,
        run.images_seen if is_pretrained else 0,
        run.flops if is_pretrained else 0,
        _flops(graph, inputs.count, cell.codebook, cell.tokens) if is_pretrained else 0,
        _flops(graph, inputs.count, cell.classifier) if cell.classifier else 0,
        sum(read_result(root, folder)["seconds"] for folder in (cell.codebook, cell.tokens)) if is_pretrained else 0,
        _seconds_of_run(root / cell.run / OUTPUT, run.images_seen) if is_pretrained else 0,
        result[cell.probe]["seconds"] if cell.probe else 0,
        _seconds_of_run(root / cell.classifier / OUTPUT, None) if cell.classifier else 0,
    )


def _flops(graph: Graph, count: int, *folders: str) -> int | None:
    """Of some steps together; None if those of one are not known."""
    flops = [flops_of_step(graph.steps[folder], count) for folder in folders]
    known = [one for one in flops if one is not None]
    return sum(known) if len(known) == len(flops) else None


def _seconds_of_run(folder: Path, images: int | None) -> float:
    """Seconds of a run's steps, as its log states their speed: those of resumed runs are in it, too."""
    lines, seconds, before = read_lines(folder / "metrics.jsonl"), 0.0, 0
    if not lines:
        raise DataError(
            f"{folder / 'metrics.jsonl'} is missing or empty; delete {folder.parent} and give the same command again."
        )
    batch = (images or 0) / lines[-1]["step"] if images else _batch_size(folder)
    for line in lines:
        seconds += (line["step"] - before) * batch / max(line["images_per_second"], 1e-9)
        before = line["step"]
    return round(seconds, 1)


def _batch_size(folder: Path) -> int:
    import yaml

    return int(yaml.safe_load((folder / "settings.yaml").read_text())["train"]["batch_size"])


def cells_of(cells: Sequence[Measured], tokenizer: str, model: str, budget: str) -> list[Measured]:
    """The cells that are compared with each other: of one tokenizer, model and budget, or without pre-training."""
    return [
        one
        for one in cells
        if (one.cell.tokenizer, one.cell.model) == (tokenizer, model) and one.cell.budget in (budget, "")
    ]


def _summaries(study: Study, cells: list[Measured]) -> list[Summary]:
    """Rows in the order of the study; those without pre-training come once for each budget."""
    rows = []
    for tokenizer in study.tokenizers:
        for model in study.models:
            for budget in study.budgets:
                group = cells_of(cells, tokenizer, model, budget)
                for row in [*study.objectives, *study.comparisons]:
                    rows.append(_summary(study, group, row, (tokenizer, model, budget)))
    return rows


def _summary(study: Study, group: list[Measured], row: str, place: tuple[str, str, str]) -> Summary:
    own = [one for one in group if one.cell.row == row]
    scores: dict[str, Spread] = {}
    differences: dict[str, Difference] = {}
    for evaluation in study.evaluations:
        values, baseline = _by_seed(group, row, evaluation), _by_seed(group, study.baseline, evaluation)
        if not values:
            continue
        scores[evaluation] = spread(list(values.values()))
        difference = None if row == study.baseline else paired_difference(values, baseline)
        differences |= {evaluation: difference} if difference else {}
    names = ("tokenizer", "pretraining", "probe", "finetuning")
    seconds = {name: sum(getattr(one, f"{name}_seconds") for one in own) / len(own) for name in names}
    runs = tuple(one.cell.run for one in own if one.cell.budget)
    flops = (own[0].flops, own[0].tokenizer_flops, own[0].finetuning_flops)
    return Summary(*place, row, scores, differences, own[0].images, *flops, seconds, runs)


def _by_seed(group: list[Measured], row: str, evaluation: str) -> dict[int, float]:
    return {one.cell.seed: one.scores[evaluation] for one in group if one.cell.row == row and evaluation in one.scores}
