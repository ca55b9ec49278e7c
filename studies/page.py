"""The page of a finished study: who is ahead, tables, single seeds, learning curves, costs, and a page of each run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import yaml

from ..shared.printable import printable
from ..shared.report.render import write_page
from ..shared.storage.lock import sole_writer
from ..train_stage.report import read_run, write_runs
from ..train_stage.runs.jsonl import read_lines
from ..train_stage.runs.schema import checked_line
from .graph import CLASSIFIER, CODEBOOK, OUTPUT, PROBE, RUN, TOKENS, Graph, Step
from .scores import SPLITS, Measured, StudyResult, Summary, cells_of
from .tables import NAMES, difference_text, flops_of, score_text, unit_of_costs

NAME = "results.html"
_REPORT = "report.html"
_KINDS = {CODEBOOK: "codebook", TOKENS: "token store", RUN: "pre-training", PROBE: "evaluation"}
_KINDS[CLASSIFIER] = "fine-tuning"
_SAME = 1e-12
"""Means that differ by less are equal but for rounding."""


def write_study_page(result: StudyResult, graph: Graph) -> Path:
    """Writes results.html, and report.html into the folder of each pre-training and fine-tuning that has none newer
    than its metrics. Links are relative: the folder may be moved.

    Raises:
        DataError if a run's files cannot be read, or a page cannot be written.
    """
    for folder, step in graph.steps.items():
        if step.kind in (RUN, CLASSIFIER):
            _write_page_of_run(result.root, folder)
    path, name = result.root / NAME, result.root.name
    with sole_writer(path):
        return write_page(path, "study", title=f"{name}: mapet study", data=_data(result, graph), title_of_study=name)


def _data(result: StudyResult, graph: Graph) -> dict[str, Any]:
    groups = [_Group(result, graph, place, rows).to_json() for place, rows in result.groups().items()]
    differences = [one for row in result.summaries for one in row.differences.values()]
    return {
        "baseline": result.study.baseline,
        "evaluations": [NAMES[name] for name in result.study.evaluations],
        "rows": [*result.study.objectives, *result.study.comparisons],
        "seeds": result.study.seeds,
        "groups": groups,
        "leaders": _leaders([verdict for group in groups for verdict in group["verdicts"]]),
        "differences": len(differences),
        "intervals": sum(one.low is not None for one in differences),
        "excluding_zero": sum(one.is_significant for one in differences),
        "splits": SPLITS,
        "unit": unit_of_costs(result)[1],
        "yaml": yaml.safe_dump(msgspec.to_builtins(result.study), sort_keys=False, allow_unicode=True).splitlines(),
    }


def _write_page_of_run(root: Path, folder: str) -> None:
    """Unless there is one that is newer than the run's metrics."""
    page, run = root / folder / _REPORT, root / folder / OUTPUT
    with sole_writer(page):
        if not page.exists() or page.stat().st_mtime < (run / "metrics.jsonl").stat().st_mtime:
            write_runs(page, [read_run(run, Path(folder).name)])


@dataclass(frozen=True)
class _Group:
    """The rows of one tokenizer, model and budget."""

    result: StudyResult
    graph: Graph
    place: tuple[str, str, str]
    rows: Sequence[Summary]

    def to_json(self) -> dict[str, Any]:
        order = [row.row for row in self.rows]
        cells = sorted(cells_of(self.result.cells, *self.place), key=lambda one: order.index(one.cell.row))
        curves = [self._curve(one) for one in cells if one.cell.budget]
        return {
            "place": self.place,
            "rows": [self._row(row, [one for one in cells if one.cell.row == row.row]) for row in self.rows],
            "verdicts": [self._verdict(name) for name in self.result.study.evaluations],
            "cells": [self._cell(one) for one in cells],
            "curves": [curve for curve in curves if curve["points"]],
        }

    def _row(self, row: Summary, cells: Sequence[Measured]) -> dict[str, Any]:
        unit, evaluations = unit_of_costs(self.result)[0], self.result.study.evaluations
        return {
            "row": row.row,
            "scores": [score_text(row.scores.get(name)) for name in evaluations],
            "differences": [difference_text(row.differences.get(name)) for name in evaluations],
            "is_best": [row.row in self._best(name) for name in evaluations],
            "means": [row.scores[name].mean if name in row.scores else None for name in evaluations],
            "values": [[(x.cell.seed, x.scores[name]) for x in cells if name in x.scores] for name in evaluations],
            "images": row.images,
            "flops": [None if flops is None else f"{flops / unit:,.3g}" for flops in flops_of(row)],
            "seconds": [f"{seconds:,.0f}" for seconds in row.seconds.values()],
        }

    def _best(self, name: str) -> list[str]:
        """The rows with the best mean of an evaluation; several if they are equal."""
        means = {row.row: row.scores[name].mean for row in self.rows if name in row.scores}
        return [row for row, mean in means.items() if mean > max(means.values()) - _SAME]

    def _verdict(self, name: str) -> dict[str, Any]:
        """The rows with the best mean, and the difference that says how certain that is.

        It is the leader's from the baseline or, where the baseline leads, that of the next row.
        """
        baseline, best = self.result.study.baseline, self._best(name)
        ranked = sorted((row for row in self.rows if name in row.scores), key=lambda row: -row.scores[name].mean)
        compared = next((row for row in ranked if row.row != baseline), None)
        found = compared.differences.get(name) if compared else None
        difference = found and {**msgspec.to_builtins(found), "excludes_zero": found.is_significant}
        return {
            "evaluation": NAMES[name],
            "best": best,
            "mean": score_text(ranked[0].scores[name]),
            "compared": compared and compared.row,
            "difference": difference,
        }

    def _cell(self, one: Measured) -> dict[str, Any]:
        cell = one.cell
        used = [cell.codebook, cell.tokens, cell.run] if cell.budget else []
        steps = [self.graph.steps[folder] for folder in (*used, cell.probe, cell.classifier) if folder]
        place = (cell.tokenizer, cell.model, cell.budget, cell.row, str(cell.seed))
        return {
            "key": "/".join(quote(printable(part), safe="") for part in place),
            "row": cell.row,
            "seed": cell.seed,
            "scores": [one.scores.get(name) for name in self.result.study.evaluations],
            "steps": [_described(step) for step in steps],
        }

    def _curve(self, one: Measured) -> dict[str, Any]:
        """k-NN accuracy by images seen and by FLOPs."""
        step, path = self.graph.steps[one.cell.run], self.result.root / one.cell.run / OUTPUT / "probe.jsonl"
        batch, flops = step.settings.train.batch_size if step.settings else 0, one.flops / one.images
        lines = [line for line in read_lines(path) if checked_line(line, path).get("knn") is not None]
        seen = [(line["step"] * batch, line["knn"]) for line in lines if math.isfinite(line["knn"])]
        points = [(images, images * flops, knn) for images, knn in seen]
        return {"row": one.cell.row, "seed": one.cell.seed, "points": points}


def _described(step: Step) -> dict[str, Any]:
    """What a step is, where it is, and what it was given."""
    page = f"{step.folder}/{_REPORT}" if step.kind in (RUN, CLASSIFIER) else None
    return {"kind": _KINDS[step.kind], "folder": step.folder, "settings": _given(step), "page": page}


def _given(step: Step) -> list[str]:
    """Options of a tokenizer's step, settings of a run, without paths of images."""
    if step.tokenizer:
        of_codebook = step.tokenizer.published or step.tokenizer.codebook
        options = of_codebook if step.kind == CODEBOOK else step.tokenizer.tokens
        return [f"{name}={value}" for name, value in options.items()]
    given = [word for flag, word in pairwise(step.words) if flag == "--set"]
    return [word for word in given if not word.startswith(("probe.images=", "probe.val="))]


def _leaders(verdicts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How often each row has the best mean alone, and how often its interval against the baseline excludes zero."""
    alone = [verdict for verdict in verdicts if len(verdict["best"]) == 1]
    found = []
    for row in dict.fromkeys(verdict["best"][0] for verdict in alone):
        own = [verdict for verdict in alone if verdict["best"] == [row]]
        certain = sum(verdict["compared"] == row and verdict["difference"]["excludes_zero"] for verdict in own)
        found.append({"row": row, "times": len(own), "certain": certain})
    return sorted(found, key=lambda one: -one["times"])
