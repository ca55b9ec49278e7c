"""The page of a finished study, opened in a real browser."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from mapet.shared.errors import DataError
from mapet.shared.printable import printable
from mapet.studies.graph import RUN, Inputs, build_graph
from mapet.studies.page import write_study_page
from mapet.studies.scores import StudyResult, collect
from msgspec.structs import replace as replace_fields

from .conftest import BASELINE, CURVE, FOREIGN, SCORES, TOKENIZER, Finished

BETTER = printable(FOREIGN)


@pytest.fixture
def page_of_study(finished: Finished) -> Path:
    return finished.out / "results.html"


@pytest.fixture
def moved(finished: Finished, tmp_path: Path) -> Path:
    """The study's folder in another place."""
    return Path(shutil.copytree(finished.out, tmp_path / "moved"))


def cell_address(budget: str, row: str, seed: int) -> str:
    return "#cell=" + "/".join(quote(printable(part), safe="") for part in (TOKENIZER, "mini", budget, row, str(seed)))


def texts(page, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def one_seed(finished: Finished, root: Path) -> StudyResult:
    """The figures of seed 0 alone."""
    study = replace_fields(finished.result.study, seeds=[0])
    inputs = Inputs("images", "val", 96, root)
    return collect(study, build_graph(study, inputs), inputs)


def test_the_page_says_who_is_ahead_and_no_more_than_the_intervals_permit(page_of_study: Path, open_page):
    page = open_page(page_of_study).page
    assert page.title() == "my <study>: mapet study"
    (lede,) = texts(page, "#ahead")
    assert lede == (
        f"Over 2 groups (tokenizer, model and budget) and 3 evaluations, 6 cases: {BETTER} has the best mean in 4 (its "
        f"interval against the baseline excludes zero in 2); {BASELINE} in 2 (it is the baseline)."
    )
    linear, knn, finetuned = texts(page, "section:first-of-type .verdicts dd")
    assert linear == (
        f"{BETTER} has the best mean, 48.0 ± 4.0 %, 6.0 points above the baseline {BASELINE}. The 95 % interval of the "
        "difference, +1.0 to +11.0 points, excludes zero."
    )
    assert knn.endswith("-8.8 to +12.8 points, includes zero: 3 seeds do not show that the two differ.")
    assert finetuned == (
        f"The baseline {BASELINE} has the best mean, 52.0 ± 2.0 %; next is {BETTER}, 2.0 points below. The difference "
        "is the same for every seed, so there is no interval."
    )
    differences = 2 * sum(len(SCORES[row]) for row in SCORES if row != BASELINE)
    (said,) = texts(page, "#comparisons")
    assert said.startswith(f"{differences} differences from the baseline are shown. {differences - 2} have an interval")
    assert f"about {0.05 * (differences - 2):.1f} would exclude zero by chance" in said


def test_every_figure_is_in_a_table(finished: Finished, page_of_study: Path, open_page):
    page = open_page(page_of_study).page
    results = texts(page, "section:first-of-type .results tbody tr")
    assert results[0] == f"{BASELINE} 42.0 ± 2.0 33.0 ± 3.0 52.0 ± 2.0"
    assert results[1] == f"{BETTER} 48.0 ± 4.0 +6.0 [+1.0, +11.0]* 35.0 ± 2.0 +2.0 [-8.8, +12.8] 50.0 ± 2.0 -2.0"
    assert len(results) == len(SCORES)
    seeds = texts(page, "section:first-of-type .cells tr[data-cell]")
    expected = [
        f"{printable(row)} seed {seed} " + " ".join(f"{100 * values[seed]:.1f}" for values in scores.values())
        for row, scores in SCORES.items()
        for seed in range(3)
    ]
    assert seeds == expected
    costs = texts(page, "section:first-of-type .costs tbody tr")
    baseline = finished.result.summaries[0]
    assert costs[0].startswith(f"{BASELINE} 192 {baseline.tokenizer_flops / 1e9:.3g} {baseline.flops / 1e9:.3g} ")
    assert costs[-1].split()[:5] == ["pixels", "0", "0", "0", "0"]
    assert "evaluations:\n- linear\n- knn\n- finetuned\n" in page.locator("#yaml").text_content()


def test_each_seed_is_a_dot_and_each_curve_a_line(finished: Finished, page_of_study: Path, open_page):
    page = open_page(page_of_study).page
    for chart in ("#by-flops-0", "#by-flops-1"):  # charts are drawn when they come near
        page.locator(chart).scroll_into_view_if_needed()
        page.wait_for_selector(f"{chart} svg")
    dots = page.eval_on_selector_all(".dots .chart", "all => all.map((one) => one.querySelectorAll('circle').length)")
    assert dots == [12, 12, 9] * 2  # rows that have the evaluation, with three seeds
    for chart in ("by-images-0", "by-flops-0"):
        lines = f"#{chart} svg g[stroke-linejoin] > path"
        assert page.locator(lines).count() == 2 + 6  # means, and seeds
    groups = page.evaluate("page.data.groups")
    runs = {(cell.row, cell.budget, cell.seed): finished.graph.steps[cell.run] for cell in finished.graph.cells}
    for group in groups:
        for curve in group["curves"]:
            row = {printable(name): name for name in CURVE}[curve["row"]]
            run = runs[row, group["place"][2], curve["seed"]]
            knn = [value + 0.02 * curve["seed"] * nth for value, nth in zip(CURVE[row], (1, 2), strict=True)]
            per_image = run.flops / run.images_seen
            expected = [[96, 96 * per_image, knn[0]], [192, 192 * per_image, knn[1]]]
            assert curve["points"] == [pytest.approx(point) for point in expected]
    assert [len(group["curves"]) for group in groups] == [6, 6]


def test_the_address_of_a_cell_opens_it_and_its_run_wherever_the_folder_is(moved: Path, open_page):
    opened = open_page(moved / "results.html", cell_address("equal images", FOREIGN, 1))
    page = opened.page
    (about,) = page.locator("tr[data-about]:visible").all()
    assert page.locator("tr.current[data-cell]").inner_text().split("\t")[0].strip() == BETTER
    assert page.locator("tr.current[data-cell] a").get_attribute("aria-current") == "true"
    text = about.inner_text()
    assert "restarts=1" in text
    assert "objective.name=mapet" in text
    assert "train.seed=1" in text
    assert str(moved.parent) not in text
    folders = [moved / code for code in about.locator("dd > code").all_inner_texts()]
    assert len(folders) == 5
    assert all((folder / "result.json").is_file() for folder in folders)
    links = about.get_by_role("link", name="page of this run")
    assert links.count() == 2
    for at, figure in ((0, "k-NN"), (1, "validation, top-1")):
        links.nth(at).click()
        page.wait_for_selector(f"[data-figure='{figure}']")
        page.go_back()
        page.wait_for_selector("tr[data-about]:visible")


def test_a_cell_opens_and_closes_with_the_keyboard(page_of_study: Path, open_page):
    page = open_page(page_of_study).page
    link = page.locator("section:first-of-type").get_by_role("link", name="Seed 2 of random init: folders and settings")
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("tr[data-about]:visible")
    # Without pre-training it belongs to the groups of both budgets.
    assert page.locator("tr[data-about]:visible").count() == 2
    assert page.evaluate("location.hash") == cell_address("", "random init", 2)
    page.keyboard.press("Escape")
    assert page.locator("tr[data-about]:visible").count() == 0
    assert link.evaluate("(link) => link === document.activeElement")
    assert page.evaluate("location.hash") == ""


@pytest.mark.parametrize("address", ["#cell=no/such/cell/here/0", "#cell=%E0%A4%A", "#cell="])
def test_an_address_without_a_cell_is_said_so(page_of_study: Path, open_page, address: str):
    page = open_page(page_of_study, address).page
    assert texts(page, "#lost") == ["This study has no cell of the name in the address."]
    assert page.locator("tr[data-about]:visible").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1440, "dark")])
def test_the_page_is_accessible_and_fits(page_of_study: Path, open_page, width: int, scheme: str):
    address = cell_address("equal FLOPs", FOREIGN, 0)
    opened = open_page(page_of_study, address, width=width, scheme=scheme)
    for chart in ("#by-flops-0", "#by-flops-1"):
        opened.page.locator(chart).scroll_into_view_if_needed()
        opened.page.wait_for_selector(f"{chart} svg")
    for summary in opened.page.locator("summary").all():
        summary.click()
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    assert opened.faults() == []
    assert opened.page.locator("main b, main i").count() == 0


def test_a_run_page_is_written_again_only_if_the_run_went_on(finished: Finished, moved: Path):
    result = replace(finished.result, root=moved)
    first, second = [folder for folder, step in finished.graph.steps.items() if step.kind == RUN][:2]
    for folder in (first, second):
        (moved / folder / "report.html").write_text("kept")
        os.utime(moved / folder / "report.html", (2e9, 2e9))
    os.utime(moved / second / "output" / "metrics.jsonl", (3e9, 3e9))
    write_study_page(result, finished.graph)
    assert (moved / first / "report.html").read_text() == "kept"
    assert "<!doctype html>" in (moved / second / "report.html").read_text()
    assert not list(moved.rglob(".*.lock*"))


def test_one_seed_has_no_interval_and_no_curves_are_drawn_where_none_were_measured(
    finished: Finished, moved: Path, open_page
):
    for path in moved.glob("run/*/output/probe.jsonl"):
        path.unlink()
    result = one_seed(finished, moved)
    page = open_page(write_study_page(result, build_graph(result.study, Inputs("images", "val", 96, moved)))).page
    (lede,) = texts(page, "#ahead")
    assert lede.endswith("There is one seed, so no difference has an interval: all of it may be chance.")
    assert "excludes zero" not in lede
    linear = texts(page, ".verdicts dd")[0]
    assert linear.endswith("There is one seed and therefore no interval: this may be chance.")
    assert texts(page, "#comparisons")[0].endswith(
        "None has an interval. Rows other than the baseline are not compared with each other."
    )
    assert page.locator("[id^=by-images]").count() == 0


def test_equal_means_are_no_lead(finished: Finished, moved: Path, open_page):
    for path in moved.glob("*/*/result.json"):
        result = json.loads(path.read_text())
        scores = {features: dict.fromkeys(names, 0.25) for features, names in result["scores"].items()}
        path.write_text(json.dumps({**result, "scores": scores}))
    inputs = Inputs("images", "val", 96, moved)
    result = collect(finished.result.study, finished.graph, inputs)
    page = open_page(write_study_page(result, finished.graph)).page
    assert texts(page, "#ahead")[0].endswith("6 cases: the best means are equal in 6.")
    assert texts(page, ".verdicts dd")[2] == (
        f"{BASELINE}, {BETTER} and from scratch have the same mean, 25.0 ± 0.0 %, and no row has a better one."
    )


def test_a_run_without_metrics_is_one_sentence(finished: Finished, moved: Path):
    folder = next(folder for folder, step in finished.graph.steps.items() if step.kind == RUN)
    (moved / folder / "output" / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl is missing or empty; delete .* and give the same command"):
        collect(finished.result.study, finished.graph, Inputs("images", "val", 96, moved))
