"""A study's table in every format: figures, costs, and names that are not the package's own."""

import csv
import io
import json
import re
from dataclasses import replace

import pytest
from mapet.shared.printable import printable
from mapet.shared.runtime import console
from mapet.studies.graph import Step
from mapet.studies.plan import flops_of_step, study_dry_run
from mapet.studies.schema import Tokenizer
from mapet.studies.scores import StudyResult
from mapet.studies.tables import difference_text, show_table, to_csv, to_latex, to_markdown
from msgspec.structs import replace as replace_fields
from rich.console import Console

from .conftest import BASELINE, FOREIGN, TOKENIZER, Finished

ROWS = [BASELINE, FOREIGN, "random init", "from scratch", "pixels"]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch):
    """shown(result, width): what is printed on a terminal of that width."""

    def show(result: StudyResult, width: int) -> str:
        text = io.StringIO()
        monkeypatch.setattr(console, "_stdout", lambda: Console(width=width, file=text))
        with console.running_command():
            show_table(result)
        return text.getvalue()

    return show


def lines_of(result: StudyResult) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(result))))


@pytest.mark.parametrize("width", [80, 120])
def test_every_name_and_figure_can_be_read_on_a_terminal(finished: Finished, shown, width: int):
    text = shown(finished.result, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines()]
    scores = [line for line in cells if len(line) == 4]
    names = "".join(line[1].replace(" ", "") for line in scores)
    for name in ROWS:  # each is folded inside its column; 2 budgets x the evaluations that it has
        times = {"from scratch": 1, "random init": 2, "pixels": 2}.get(name, 3)
        assert names.count(printable(name).replace(" ", "")) == 2 * times, name
    assert next(line[2:] for line in scores if line[3].endswith("*")) == ["48.0 ± 4.0", "+6.0 [+1.0, +11.0]*"]


def test_many_evaluations_fit_on_eighty_columns(finished: Finished, shown):
    study = replace_fields(finished.result.study, evaluations=["linear", "attentive", "knn", "finetuned"])
    rows = [
        replace(row, scores={**row.scores, "attentive": row.scores["linear"]} if "linear" in row.scores else row.scores)
        for row in finished.result.summaries
    ]
    text = shown(replace(finished.result, study=study, summaries=rows), 80)
    assert "…" not in text
    assert text.count("random init") == 2 * (3 + 1)


def test_costs_are_those_that_the_plan_counts(finished: Finished, chain):
    plan = study_dry_run(finished.file, images=chain.images)
    lines = [line for line in lines_of(finished.result) if line["evaluation"] == "finetuned"]
    made = [line for line in lines if line["row"] in (BASELINE, printable(FOREIGN))]
    tokenizer = plan.kinds["codebook"].flops + plan.kinds["tokens"].flops
    assert tokenizer > 0
    assert {line["tokenizer_flops"] for line in made} == {str(tokenizer)}
    assert len(made) == 12
    runs = {line["run"]: int(line["flops"]) for line in made}
    assert sum(runs.values()) == plan.kinds["run"].flops
    classifiers = {(line["row"], line["seed"], line["run"]): int(line["finetuning_flops"]) for line in lines}
    assert sum(classifiers.values()) == plan.kinds["classifier"].flops
    scratch = [line for line in lines if line["row"] == "from scratch"]
    assert {(line["flops"], line["tokenizer_flops"]) for line in scratch} == {("0", "0")}


def test_flops_that_are_not_known_are_not_zero(finished: Finished, shown):
    result = replace(
        finished.result,
        cells=[replace(one, tokenizer_flops=None) for one in finished.result.cells],
        summaries=[replace(row, tokenizer_flops=None) for row in finished.result.summaries],
    )
    assert {line["tokenizer_flops"] for line in lines_of(result)} == {""}
    assert all("| unknown |" in line for line in to_markdown(result).splitlines()[2:12])
    assert to_latex(result).count("& unknown &") == 10
    assert shown(result, 80).count("unknown") == 10
    assert json.loads(json.dumps(result.to_json()))["cells"][0]["tokenizer_flops"] is None


def test_a_tower_that_cannot_be_opened_has_unknown_flops():
    for tower in ("hf-hub:someone/clip", "local-dir:/nowhere"):
        step = Step("tokens", "tokens/x", (), tokenizer=Tokenizer({"tower": tower, "k": 16}))
        assert flops_of_step(step, 96) is None


def test_foreign_names_are_text_in_csv_and_markdown(finished: Finished):
    lines = lines_of(finished.result)
    assert {line["row"] for line in lines} == {printable(name) for name in ROWS}
    assert {line["tokenizer"] for line in lines} == {printable(TOKENIZER)}
    table = to_markdown(finished.result).split("\n\n")[0].splitlines()
    cells = [re.split(r"(?<!\\)\|", line.replace(r"\\", "\0"))[1:-1] for line in table]
    assert {len(line) for line in cells} == {len(cells[0])}
    unescaped = [re.sub(r"\\(.)", r"\1", line[3].strip()).replace("\0", "\\") for line in cells[2:]]
    assert unescaped == [printable(name) for name in ROWS] * 2
    assert not re.search(r"(?<!\\)[<_*`&~]", "".join(line[3] for line in cells))


def test_foreign_names_are_text_in_latex(finished: Finished):
    latex = to_latex(finished.result)
    rows = latex.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert len(rows) == 10
    columns = re.search(r"\{tabular\}\{(l+r+)\}", latex)[1]
    for row in rows:
        assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1
        assert row.endswith(r" \\")
        bare = re.sub(r"\\([&%$#_{}])|\\text[a-z]+\{\}|\$\\pm\$|\\\\$", "", row)
        assert not set('\\{}$#%^~_<>|"') & set(bare), row


def test_a_row_that_begins_like_an_argument_of_the_row_before_is_text(finished: Finished):
    rows = [replace(row, tokenizer="[2cm]") for row in finished.result.summaries]
    assert to_latex(replace(finished.result, summaries=rows)).count("\n{}[2cm] & ") == 10


def test_differences_without_an_interval_have_no_star(finished: Finished):
    row = finished.result.summaries[1]
    assert [difference_text(row.differences[name]) for name in finished.result.study.evaluations] == [
        "+6.0 [+1.0, +11.0]*",
        "+2.0 [-8.8, +12.8]",
        "-2.0",
    ]
