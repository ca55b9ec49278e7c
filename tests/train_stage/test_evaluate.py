"""train evaluate: its numbers are those of the logits, and its page shows them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.quickstart.drawings import write_drawings
from mapet.shared.errors import DataError
from mapet.train_stage.evaluate import evaluate, show
from mapet.train_stage.export import export
from mapet.train_stage.finetune import finetune
from mapet.train_stage.import_weights import import_weights
from mapet.train_stage.predict import predict
from PIL import Image

HOSTILE = "<script>document.title='broken'"
NAMES = [f"drawing {letter}" for letter in "abcdefghijklmno"] + [HOSTILE]


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of 48 labelled drawings, class numbers 0 to 15."""
    folder = tmp_path_factory.mktemp("val") / "val"
    write_drawings(folder, 48, seed=12, per_tar=48)
    return folder


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("names") / "names.txt"
    file.write_text("".join(f"{name}\n" for name in NAMES))
    return file


@pytest.fixture(scope="module")
def tuned(chain, run: Path, val: Path, names: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned run whose outputs have names."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    settings = ["train.batch_size=16", "train.epochs=2", "optimizer.warmup_epochs=0", "augment.rand_augment=null"]
    return finetune(run, chain.images, val, out, classes=names, overrides=settings).parents[1]


def test_numbers_are_those_that_the_run_measured_itself(tuned: Path, val: Path, names: Path):
    result = evaluate(tuned, val, classes=names)
    measured = json.loads((tuned / "probe.jsonl").read_text().splitlines()[-1])
    numbers = result.evaluation.numbers
    assert (numbers["top1"], numbers["top5"]) == pytest.approx((measured["top1"], measured["top5"]))
    assert numbers["nll"] == pytest.approx(measured["loss"], rel=1e-5)
    assert result.evaluation.protocol["images"] == 48
    assert result.evaluation.protocol["preprocess"]["resize_size"] == 71
    assert sum(one.images for one in result.classes) == 48
    assert sum(bin.images for bin in result.calibration) == 48
    assert sum(one.images for one in result.confusions) == round(48 * (1 - numbers["top1"]))


def test_a_run_its_checkpoint_its_import_and_its_export_measure_the_same(
    tuned: Path, val: Path, names: Path, tmp_path: Path
):
    export(tuned, tmp_path / "export")
    import_weights(tuned, tmp_path / "import")
    kinds = [tuned, next((tuned / "checkpoints").iterdir()), tmp_path / "export", tmp_path / "import"]
    results = [evaluate(weights, val, classes=names) for weights in kinds]
    first = results[0].evaluation.numbers
    assert all(one.evaluation.numbers == pytest.approx(first, rel=1e-5) for one in results)
    assert all(one.classes == results[0].classes for one in results)


def test_labels_join_by_name_whatever_their_numbers(tuned: Path, val: Path, names: Path, tmp_path: Path):
    """The outputs are the sorted names; class numbers of the images are those of the list of names."""
    predictions = {one.key: one.classes[0].name for one in predict(tuned, val)}
    listed = tmp_path / "labels.csv"
    listed.write_text("key,label\n" + "".join(f"{key},{json.dumps(name)}\n" for key, name in predictions.items()))
    assert evaluate(tuned, val, labels=listed).evaluation.numbers["top1"] == 1
    numbered = tmp_path / "numbered.csv"
    numbered.write_text("key,label\n" + "".join(f"{key},{NAMES.index(name)}\n" for key, name in predictions.items()))
    assert evaluate(tuned, val, labels=numbered, classes=names).evaluation.numbers["top1"] == 1


def test_a_subset_restricts_the_logits(tuned: Path, tmp_path: Path, write_folder):
    """The classes are folders; predictions are made among three outputs, named or numbered."""
    drawn = np.random.default_rng(1)
    pictures = {}
    for name in NAMES[2:5]:
        for number in range(4):
            picture = Image.fromarray(drawn.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            pictures[f"{name}/{name[-1]}{number}.png"] = picture
    for name, picture in pictures.items():
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "val" / name)
    every = {one.key: {c.name: c.probability for c in one.classes} for one in predict(tuned, tmp_path / "val", top=16)}
    subset = tmp_path / "subset.txt"
    outputs = sorted(NAMES).index(NAMES[3])
    subset.write_text(f"{NAMES[4]}\n{NAMES[2]}\n{outputs}\n")
    result = evaluate(tuned, tmp_path / "val", class_subset=subset)
    right, losses = [], []
    for key, probabilities in every.items():
        among = {name: probabilities[name] for name in NAMES[2:5]}
        right.append(max(among, key=among.__getitem__) == key.split("/")[0])
        losses.append(-np.log(among[key.split("/")[0]] / sum(among.values())))
    assert result.evaluation.numbers["top1"] == pytest.approx(np.mean(right))
    assert result.evaluation.numbers["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.evaluation.protocol["outputs"] == 3
    assert result.evaluation.protocol["outputs_of_the_head"] == 16
    assert [one.name for one in result.classes] == [NAMES[4], NAMES[2], NAMES[3]]


@pytest.mark.parametrize("subset", [False, True])
def test_real_labels(
    tuned: Path, val: Path, names: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], subset: bool
):
    """Half of the images have the predicted output among their ReaL labels, a few have none."""
    outputs = sorted(NAMES)
    listed = tmp_path / "subset.txt"
    listed.write_text("".join(f"{name}\n" for name in reversed(outputs)))
    predictions = sorted(predict(tuned, val), key=lambda one: one.key)
    right = [one.classes[0].output for one in predictions]
    real = [[(output + 1) % 16, output] if at < 20 else [(output + 1) % 16] for at, output in enumerate(right)]
    real[40:] = [[]] * 8
    (tmp_path / "real.json").write_text(json.dumps(real))
    options = {"class_subset": listed} if subset else {}
    result = evaluate(tuned, val, classes=names, real=tmp_path / "real.json", **options)
    assert result.evaluation.numbers["real"] == 20 / 40
    assert result.evaluation.protocol["real"]["images"] == 40
    agreement = result.evaluation.protocol["real"]["labels_among_them"]
    assert ("of the labels are among the ReaL labels" in capsys.readouterr().err) == (agreement < 0.5)


def test_what_is_printed(tuned: Path, val: Path, names: Path, capsys: pytest.CaptureFixture[str]):
    result = evaluate(tuned, val, classes=names)
    capsys.readouterr()
    show(result, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(result.to_json()))
    assert set(printed) == {"name", "protocol", "numbers", "classes", "confusions", "calibration"}
    show(result)
    text = capsys.readouterr().out
    assert f"{result.evaluation.numbers['top1']:.2%}" in text
    assert "shorter side to 71 px (bilinear), centre of 64 px" in text
    assert NAMES[0] in text


@pytest.fixture(scope="module")
def page(tuned: Path, val: Path, names: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    evaluate(tuned, val, classes=names, html=path)
    return path


def test_the_page_shows_the_numbers(page: Path, tuned: Path, val: Path, names: Path, open_page):
    opened = open_page(page).page
    result = evaluate(tuned, val, classes=names)
    script = "all => Object.fromEntries(all.map((one) => [one.dataset.figure, Number(one.dataset.value)]))"
    figures = opened.locator("[data-figure]").evaluate_all(script)
    numbers = result.evaluation.numbers
    assert figures == {
        "top-1": numbers["top1"],
        "top-5": numbers["top5"],
        "calibration error": numbers["ece"],
        "cross-entropy": numbers["nll"],
        "Brier score": numbers["brier"],
    }
    assert opened.title() == "run: mapet classifier"
    opened.wait_for_selector("#confusion svg")
    opened.wait_for_selector("#reliability svg")
    assert opened.locator("#reliability svg circle").count() == sum(bin.images > 0 for bin in result.calibration)
    assert opened.locator("#confusion svg:last-of-type rect").count() >= 16 * 16
    mistakes = 48 - round(48 * numbers["top1"])
    assert opened.locator(".mistake").count() == min(mistakes, 24)
    assert opened.locator(".mistake img").evaluate_all("all => all.every((one) => one.naturalWidth === 192)")
    confidences = opened.locator(".mistake").all_inner_texts()
    wrong = {one.key: one.classes[0] for one in predict(tuned, val)}
    keys = [text.splitlines()[-1] for text in confidences]
    shown = [wrong[key].probability for key in keys]
    assert shown == sorted(shown, reverse=True)


def test_the_table_of_classes_is_sorted_by_a_click(page: Path, open_page):
    opened = open_page(page).page

    def column(number: int) -> list[str]:
        return [line.split("\t")[number] for line in opened.locator("#by-class tbody tr").all_inner_texts()]

    def shares() -> list[float]:
        return [float(text.split()[0]) for text in column(2)]

    opened.get_by_role("button", name="Top-1").click()
    assert shares() == sorted(shares(), reverse=True)
    assert opened.locator("[aria-sort=descending]").inner_text().startswith("Top-1")
    opened.get_by_role("button", name="Top-1").click()
    assert shares() == sorted(shares())
    opened.get_by_role("button", name="Class", exact=True).click()
    assert opened.locator("[aria-sort]").count() == 1
    assert column(0)[0] == HOSTILE  # as text
    assert column(0)[1:] == sorted(column(0)[1:])


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")])
def test_the_page_is_accessible_and_fits(page: Path, open_page, width: int, scheme: str):
    opened = open_page(page, width=width, scheme=scheme)
    opened.page.wait_for_selector("#confusion svg")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    assert opened.faults() == []


def test_of_many_classes_no_matrix_is_drawn(
    tuned: Path, val: Path, names: Path, tmp_path: Path, open_page, monkeypatch
):
    monkeypatch.setattr("mapet.train_stage.scoring.page.MOST_IN_MATRIX", 15)
    evaluate(tuned, val, classes=names, html=tmp_path / "page.html")
    opened = open_page(tmp_path / "page.html").page
    opened.wait_for_selector("#reliability svg")
    assert opened.locator("#confusion").count() == 0
    assert opened.locator("#confusions tbody tr").count() > 0


def test_the_callers_random_state_stays(tuned: Path, val: Path, names: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    evaluate(tuned, val, classes=names)
    assert torch.equal(torch.rand(3), expected)


def test_a_page_that_cannot_be_written_is_a_data_error(tuned: Path, val: Path, names: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="could not be written"):
        evaluate(tuned, val, classes=names, html=tmp_path / "file" / "page.html")
