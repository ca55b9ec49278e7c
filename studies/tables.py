"""A study's table on the terminal, as CSV, Markdown and LaTeX."""

import csv
import io
import re
from collections.abc import Sequence

from rich.table import Table

from ..shared.printable import printable
from ..shared.runtime.console import foreign, results
from .scores import SPLITS, Measured, StudyResult, Summary
from .statistics import Difference, Spread

NAMES = {"linear": "linear", "attentive": "attentive", "knn": "k-NN", "finetuned": "fine-tuned"}
_COLUMNS = ["tokenizer", "model", "budget", "row", "seed", "evaluation", "top1", "images", "flops"]
_COLUMNS += ["tokenizer_seconds", "pretraining_seconds", "probe_seconds", "finetuning_seconds", "run"]
_TEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def score_text(score: Spread | None) -> str:
    """Percent with the standard deviation over seeds."""
    if score is None:
        return ""
    return f"{100 * score.mean:.1f}" + (f" ± {100 * score.deviation:.1f}" if score.deviation is not None else "")


def difference_text(difference: Difference | None) -> str:
    """Points with the confidence interval; * marks one that excludes zero."""
    if difference is None:
        return ""
    if difference.low is None or difference.high is None:
        return f"{100 * difference.mean:+.1f}"
    star = "*" if difference.is_significant else ""
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]{star}"


def show_table(result: StudyResult) -> None:
    """Prints one table per tokenizer, model and budget, without seconds, which the files have."""
    groups: dict[tuple[str, str, str], list[Summary]] = {}
    for summary in result.summaries:
        groups.setdefault((summary.tokenizer, summary.model, summary.budget), []).append(summary)
    for place, rows in groups.items():
        grid = Table(title=foreign(f"{', '.join(place)}: top-1 in %, and difference from {result.study.baseline}"))
        grid.add_column("row")
        for heading in _headings(result)[4:-4]:
            grid.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            name, *cells = _row(result, row)[3:-4]
            grid.add_row(foreign(name), *cells)
        results.print(grid)


def to_csv(result: StudyResult) -> str:
    """One line per cell and evaluation, with the cell's costs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for one in result.cells:
        for evaluation, top1 in one.scores.items():
            if evaluation in NAMES:
                writer.writerow(_csv_line(one, evaluation, top1))
    return text.getvalue()


def to_markdown(result: StudyResult) -> str:
    """One table, and which choices were made on which images."""
    headings = _headings(result)
    lines = [headings, ["---"] * len(headings), *(_row(result, row) for row in result.summaries)]
    table = "\n".join(f"| {' | '.join(_markdown(cell) for cell in line)} |" for line in lines)
    return "\n\n".join([table, *SPLITS]) + "\n"


def to_latex(result: StudyResult) -> str:
    """A tabular for the package booktabs."""
    headings = _headings(result)
    rows = [" & ".join(map(_latex, line)) + r" \\" for line in (headings, *(_row(result, x) for x in result.summaries))]
    columns = "llll" + "r" * (len(headings) - 4)
    begin, notes = rf"\begin{{tabular}}{{{columns}}}", [f"% {sentence}" for sentence in SPLITS]
    lines = [begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", *notes]
    return "\n".join(lines) + "\n"


def _headings(result: StudyResult) -> list[str]:
    evaluations = [word for name in result.study.evaluations for word in (NAMES[name], "difference")]
    costs = ["images", "PFLOPs", "tokenizer s", "pre-training s", "probe s", "fine-tuning s"]
    return ["tokenizer", "model", "budget", "row", *evaluations, *costs]


def _row(result: StudyResult, row: Summary) -> list[str]:
    cells = [row.tokenizer, row.model, row.budget, row.row]
    for name in result.study.evaluations:
        cells += [score_text(row.scores.get(name)), difference_text(row.differences.get(name))]
    return [*cells, f"{row.images:,}", f"{row.flops / 1e15:,.3g}", *(f"{s:,.0f}" for s in row.seconds.values())]


def _csv_line(one: Measured, evaluation: str, top1: float) -> Sequence[object]:
    cell = one.cell
    place = (cell.tokenizer, cell.model, cell.budget, cell.row, cell.seed, evaluation, repr(top1))
    costs = (one.tokenizer_seconds, one.pretraining_seconds, one.probe_seconds, one.finetuning_seconds)
    return (*place, one.images, one.flops, *costs, cell.run if cell.budget else "")


def _markdown(text: str) -> str:
    return re.sub(r"([|\\`*<\[\]])", r"\\\1", printable(text))


def _latex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in printable(text))
