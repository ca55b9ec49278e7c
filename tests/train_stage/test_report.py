"""train report: runs as a page, opened in a real browser."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mapet.shared.errors import DataError, FingerprintMismatch, UsageError
from mapet.shared.images.decode import read_image
from mapet.shared.images.views import CropBox, replay
from mapet.shared.randomness import generator
from mapet.shared.sources.sources import read_records
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.train_stage.objectives.layouts import make_layout
from mapet.train_stage.report import report
from mapet.train_stage.weights.read import load_weights

HOSTILE = "<script>document.title='broken'"


@pytest.fixture
def other(run: Path, tmp_path: Path) -> Path:
    """A second run: another loss, learning rate and probes, under a name that would break a page."""
    folder = Path(shutil.copytree(run, tmp_path / HOSTILE))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = [{**line, "step": line["step"] + 1, "loss": line["loss"] - 1} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines + more))
    probes = [{"step": 3, "knn": 0.25, "linear": 0.5}, {"step": 6, "knn": 0.375}]
    (folder / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in probes))
    settings = yaml.safe_load((run / "settings.yaml").read_text())
    settings["optimizer"]["lr"] = HOSTILE
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return folder


def figures_of(page, run: int = 0) -> dict[str, float]:
    script = "all => all.map((one) => [one.dataset.figure, Number(one.dataset.value)])"
    return dict(page.locator(".run").nth(run).locator("[data-figure]").evaluate_all(script))


def curves(page) -> list[str]:
    page.wait_for_selector(".chart svg")
    return page.eval_on_selector_all(".chart:has(svg)", "all => all.map((one) => one.id)")


def lines_in(page, chart: str) -> int:
    return page.locator(f"#{chart} svg g[stroke^='var(--line']").count()


def test_the_figures_and_curves_of_a_run_are_those_of_its_metrics(run: Path, open_page):
    path = report(run)
    assert path == run / "report.html"
    opened = open_page(path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = figures_of(opened.page)
    for name in ("loss", "accuracy", "epoch"):
        assert shown[{"epoch": "epochs"}.get(name, name)] == lines[-1][name]
    assert shown["steps"] == lines[-1]["step"]
    assert shown["data wait"] == pytest.approx(np.mean([line["data_wait"] for line in lines]))
    drawn = curves(opened.page)
    numbers = [
        key
        for key, value in lines[-1].items()
        if isinstance(value, int | float) and key not in ("step", "epoch", "skipped_steps")
    ]
    assert sorted(drawn) == sorted([*(f"curve-{key}" for key in numbers), "ranks"])
    assert opened.page.evaluate("page.data.runs[0].lines") == lines
    settings = yaml.safe_load((run / "settings.yaml").read_text())
    assert f"optimizer.weight_decay\n{settings['optimizer']['weight_decay']}" in opened.page.inner_text(".settings")


def test_runs_stand_side_by_side_and_can_be_hidden(run: Path, other: Path, tmp_path: Path, open_page):
    page = open_page(report([run, other], html=tmp_path / "both.html")).page
    assert page.title() == f"run, {HOSTILE}: mapet runs"
    assert [page.locator(".run h3").nth(at).inner_text() for at in (0, 1)] == ["run", HOSTILE]
    assert (figures_of(page, 1)["k-NN"], figures_of(page, 1)["linear probe"]) == (0.375, 0.5)
    assert "k-NN" not in figures_of(page, 0)
    assert {"probes", "curve-loss"} <= set(curves(page))
    assert (lines_in(page, "curve-loss"), lines_in(page, "probes")) == (2, 2)
    page.get_by_label("run", exact=True).uncheck()
    assert lines_in(page, "curve-loss") == 1
    page.get_by_label("run", exact=True).check()
    assert lines_in(page, "curve-loss") == 2
    rows = page.locator("#different tbody tr").all_inner_texts()
    assert len(rows) == 1
    assert rows[0].split("\t")[0] == "optimizer.lr"
    assert rows[0].split("\t")[2] == HOSTILE


def test_the_accuracy_of_a_fine_tuning_on_validation_images_is_drawn(run: Path, tmp_path: Path, open_page):
    tuned = Path(shutil.copytree(run, tmp_path / "tuned"))
    lines = [{"step": 3, "top1": 0.25, "top5": 0.5, "loss": 2.0}, {"step": 6, "top1": 0.375, "top5": 0.5, "loss": 1.5}]
    (tuned / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = open_page(report(tuned)).page
    assert figures_of(page)["validation, top-1"] == 0.375
    assert "validation" in curves(page)
    assert "probes" not in curves(page)
    assert lines_in(page, "validation") == 1
    (tuned / "probe.jsonl").write_text('{"step": 3, "top1": "much"}\n')
    with pytest.raises(DataError, match=r"probe\.jsonl.*top1"):
        report(tuned)


def test_what_a_run_does_not_say_is_not_drawn(run: Path, tmp_path: Path, open_page):
    old = tmp_path / "old"
    old.mkdir()
    (old / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    page = open_page(report(old)).page
    assert figures_of(page) == {"steps": 2, "loss": 2.5}
    assert curves(page) == ["curve-loss"]
    assert "no settings.yaml" in page.inner_text("#settings + p")


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1440, "dark")])
def test_the_page_is_accessible_and_fits(
    chain, run: Path, other: Path, tmp_path: Path, open_page, width: int, scheme: str
):
    (other / "settings.yaml").write_text((run / "settings.yaml").read_text().replace("seed: 3", "seed: 4"))
    path = report([run, other], html=tmp_path / "both.html", tokens=str(chain.tokens), images=str(chain.images))
    opened = open_page(path, width=width, scheme=scheme)
    opened.page.wait_for_selector("#position-1 svg")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    assert opened.faults() == []


@torch.no_grad()
def test_predictions_are_those_of_the_newest_checkpoint(chain, run: Path, tmp_path: Path, open_page):
    path = report(run, html=tmp_path / "page.html", tokens=str(chain.tokens), images=str(chain.images), seed=5)
    page = open_page(path).page
    shown = page.evaluate("page.data.predicted")
    store, weights = TokenStore(chain.tokens), load_weights(run)
    model, model_input = weights.mapet().eval(), weights.input
    hits, asked, predictions = np.zeros(64), np.zeros(64), {}
    for record in read_records(chain.images):
        rows, at = store.find(record.key)
        view = replay(read_image(record)[0], CropBox(*rows.crops[at, 0]), bool(rows.flips[at, 0]), 64, "bilinear")
        pixels = (np.asarray(view, np.float32) / 255 - np.float32(model_input.mean)) / np.float32(model_input.std)
        order = generator(5, "report", record.key).permutation(64)
        logits = model(
            torch.tensor(pixels).permute(2, 0, 1)[None], torch.tensor(order)[None], make_layout("mapet", 64, 16)
        )
        predicted = np.full(64, -1)
        predicted[order[16:]] = logits[0].argmax(-1)
        tokens = rows.tokens[at, 0].reshape(-1)
        predictions[record.key] = (predicted, tokens)
        hits, asked = hits + (predicted == tokens), asked + (predicted >= 0)
    assert len(shown["images"]) == 24
    assert shown["all_images"] == 96
    for image, predicted in zip(shown["images"], shown["runs"][0]["images"], strict=True):
        expected, tokens = predictions[image["key"]]
        assert predicted == expected.tolist()
        assert image["tokens"] == tokens.tolist()
    assert shown["runs"][0]["accuracy"] == hits.sum() / asked.sum()
    assert shown["runs"][0]["patches"] == 96 * 48
    assert np.ravel(shown["runs"][0]["by_position"]) == pytest.approx(hits / asked)
    first = shown["runs"][0]["images"][0]
    right = sum(guess == token for guess, token in zip(first, shown["images"][0]["tokens"], strict=True))
    assert page.locator(".score").first.inner_text() == f"{right} of 48"


def test_what_cannot_be_reported_is_one_sentence(chain, tower: str, run: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot be reported: metrics.jsonl is missing"):
        report(tmp_path)
    with pytest.raises(UsageError, match="--images needs --tokens"):
        report(run, images=str(chain.images))
    with pytest.raises(UsageError, match="holds no images, only their tokens; give --images"):
        report(run, html=tmp_path / "page.html", tokens=str(chain.tokens))
    with pytest.raises(UsageError, match="is a folder; give a file"):
        report(run, html=tmp_path)
    build_codebook(chain.images, tmp_path / "book", tower=tower, k=16, iterations=1, restarts=1, seed=9)
    encode_shards(chain.tars[0], tmp_path / "book", tmp_path / "tokens", batch_size=16)
    with pytest.raises(FingerprintMismatch, match="give tokens of the same codebook"):
        report(run, html=tmp_path / "page.html", tokens=str(tmp_path / "tokens"), images=str(chain.images))
    assert not (tmp_path / "page.html").exists()
