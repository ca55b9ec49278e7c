"""A study's table on the terminal, as CSV, Markdown and LaTeX."""

import csv
import io
import re
from collections.abc import Sequence

from rich.table import Table

from ..shared.printable import printable
from ..shared.runtime.console import foreign, results
from .plan import in_unit
from .scores import SPLITS, Measured, StudyResult, Summary
from .statistics import Difference, Spread

NAMES = {"linear": "linear", "attentive": "attentive", "knn": "k-NN", "finetuned": "fine-tuned"}
_COLUMNS = ["tokenizer", "model", "budget", "row", "seed", "evaluation", "top1", "images", "flops"]
_COLUMNS += ["tokenizer_flops", "finetuning_flops"]
_COLUMNS += ["tokenizer_seconds", "pretraining_seconds", "probe_seconds", "finetuning_seconds", "run"]
_TEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
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
    """Prints two tables per tokenizer, model and budget: the figures by evaluation, and costs without seconds, which
    the files have."""
    for place, rows in result.groups().items():
        results.print(_grid_of_scores(result, place, rows))
        results.print(_grid_of_costs(result, rows))


def _grid_of_scores(result: StudyResult, place: Sequence[str], rows: Sequence[Summary]) -> Table:
    grid = Table(title=foreign(f"{', '.join(place)}: top-1 in %, and difference from {result.study.baseline}"))
    grid.add_column("evaluation", no_wrap=True)
    grid.add_column("row", overflow="fold")
    for heading in ("top-1", "difference"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for name in result.study.evaluations:
        grid.add_section()
        for at, row in enumerate(row for row in rows if name in row.scores):
            figures = (score_text(row.scores.get(name)), difference_text(row.differences.get(name)))
            grid.add_row("" if at else NAMES[name], foreign(row.row), *figures)
    return grid


def _grid_of_costs(result: StudyResult, rows: Sequence[Summary]) -> Table:
    unit, letter = unit_of_costs(result)
    grid = Table(title=f"Costs, in {letter}FLOPs")
    grid.add_column("row", overflow="fold")
    for heading in ("images", "tokenizer", "pre-training", "fine-tuning"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(foreign(row.row), f"{row.images:,}", *_flops_texts(row, unit))
    return grid


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
    cells = [[_latex(cell) for cell in line] for line in (headings, *(_row(result, row) for row in result.summaries))]
    # An asterisk or bracket after the \\ of the row before would be its argument.
    rows = ["{}" * line[0].startswith(("*", "[")) + " & ".join(line) + r" \\" for line in cells]
    columns = "llll" + "r" * (len(headings) - 4)
    begin, notes = rf"\begin{{tabular}}{{{columns}}}", [f"% {sentence}" for sentence in SPLITS]
    lines = [begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", *notes]
    return "\n".join(lines) + "\n"


def _headings(result: StudyResult) -> list[str]:
    evaluations = [word for name in result.study.evaluations for word in (NAMES[name], "difference")]
    flops = [f"{step} {unit_of_costs(result)[1]}FLOPs" for step in ("tokenizer", "pre-training", "fine-tuning")]
    costs = ["images", *flops, "tokenizer s", "pre-training s", "probe s", "fine-tuning s"]
    return ["tokenizer", "model", "budget", "row", *evaluations, *costs]


def _row(result: StudyResult, row: Summary) -> list[str]:
    cells = [row.tokenizer, row.model, row.budget, row.row]
    for name in result.study.evaluations:
        cells += [score_text(row.scores.get(name)), difference_text(row.differences.get(name))]
    seconds = [f"{seconds:,.0f}" for seconds in row.seconds.values()]
    return [*cells, f"{row.images:,}", *_flops_texts(row, unit_of_costs(result)[0]), *seconds]


def unit_of_costs(result: StudyResult) -> tuple[float, str]:
    """One unit, and its letter, for the FLOPs of all rows of a study."""
    return in_unit(max(max(filter(None, flops_of(row)), default=0) for row in result.summaries))


def flops_of(row: Summary) -> tuple[int | None, int, int | None]:
    """Of tokenizer, pre-training and fine-tuning; None where they are not known."""
    return row.tokenizer_flops, row.flops, row.finetuning_flops


def _flops_texts(row: Summary, unit: float) -> list[str]:
    return ["unknown" if flops is None else f"{flops / unit:,.3g}" for flops in flops_of(row)]


def _csv_line(one: Measured, evaluation: str, top1: float) -> Sequence[object]:
    cell = one.cell
    names = map(printable, (cell.tokenizer, cell.model, cell.budget, cell.row))
    flops = (one.flops, one.tokenizer_flops, one.finetuning_flops)
    seconds = (one.tokenizer_seconds, one.pretraining_seconds, one.probe_seconds, one.finetuning_seconds)
    return (*names, cell.seed, evaluation, repr(top1), one.images, *flops, *seconds, cell.run if cell.budget else "")


def _markdown(text: str) -> str:
    return re.sub(r"([|\\`*_~&<\[\]])", r"\\\1", printable(text))


def _latex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in printable(text))
