"""Fine-tuned classifiers from the command line: train evaluate, train predict, and what they refuse."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mapet.quickstart.drawings import write_drawings

PUBLISHED = Path(__file__).parents[1] / "train_stage" / "oracle" / "finetune.pth.tar"
"""Ten outputs without names."""
SETTINGS = ("train.batch_size=16", "train.epochs=1", "optimizer.warmup_epochs=0", "augment.rand_augment=null")
SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val") / "val"
    write_drawings(folder, 16, seed=12, per_tar=16)
    return folder


@pytest.fixture(scope="module")
def animals(write_folder, picture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders ant, bee and cat of 8 images each."""
    files = {f"{name}/{name}{at}.jpg": picture(at) for name in ("ant", "bee", "cat") for at in range(8)}
    return write_folder(tmp_path_factory.mktemp("animals") / "animals", files)


@pytest.fixture(scope="module")
def tuned(mapet, lab, animals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of ant, bee and cat. Never write into it."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    mapet("train", "finetune", lab.run, "--images", animals, "--val", animals, "--out", out, *SET).ok()
    return out


@pytest.fixture
def evaluate(mapet) -> Callable[..., object]:
    return lambda weights, val, *options: mapet("train", "evaluate", weights, "--val", val, *options)


def listed(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_run_is_evaluated(evaluate, tuned: Path, animals: Path, tmp_path: Path):
    """A fine-tuned run is evaluated, with a page."""
    outcome = evaluate(tuned, animals, "--html", tmp_path / "page.html").ok()
    assert "24 of 3 classes" in outcome.stdout
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()


def test_json_of_an_evaluation_is_all_that_stdout_has(evaluate, tuned: Path, animals: Path):
    """--json of evaluate prints one JSON document and nothing else on stdout."""
    result = json.loads(evaluate(tuned, animals, "--json").ok().stdout)
    assert result["name"] == "classifier"
    assert result["protocol"]["images"] == 24
    assert [one["name"] for one in result["classes"]] == ["ant", "bee", "cat"]


def test_images_without_labels_are_predicted(mapet, tuned: Path, write_folder, picture, tmp_path: Path):
    """Unlabelled images are predicted; --json is one line per image and nothing else on stdout."""
    images = write_folder(tmp_path / "images", {f"{at}.jpg": picture(at) for at in range(3)})
    lines = mapet("train", "predict", tuned, images, "--top", 2, "--json").ok().stdout.splitlines()
    predictions = [json.loads(line) for line in lines]
    assert [one["key"] for one in predictions] == ["0", "1", "2"]
    assert all(len(one["classes"]) == 2 for one in predictions)
    assert {one["name"] for prediction in predictions for one in prediction["classes"]} <= {"ant", "bee", "cat"}


def test_predictions_as_a_table_and_as_csv(mapet, tuned: Path, animals: Path, tmp_path: Path):
    """Predictions are a table on the terminal, and a CSV file if asked for."""
    outcome = mapet("train", "predict", tuned, animals, "--csv", tmp_path / "table.csv").ok()
    assert "ant/ant0" in outcome.stdout
    with open(tmp_path / "table.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 24


def test_hostile_names_are_printed_as_text(mapet, evaluate, lab, write_folder, picture, tmp_path: Path):
    """Class names and keys with control characters do not reach the terminal, and JSON keeps them."""
    name = "cat\x1b[31m[red]"
    files = {f"{name}/{at}.jpg": picture(at) for at in range(16)}
    images = write_folder(tmp_path / "images", {**files, **{f"dog/d{at}.jpg": picture(at) for at in range(2)}})
    run = tmp_path / "run"
    mapet("train", "finetune", lab.run, "--images", images, "--val", images, "--out", run, *SET).ok()
    for outcome in (mapet("train", "predict", run, images), evaluate(run, images)):
        assert "\x1b[31m" not in outcome.ok().text
        assert "cat\\x1b[31m[red]" in outcome.text
    lines = mapet("train", "predict", run, images, "--json").ok().stdout.splitlines()
    assert name in {one["name"] for line in lines for one in json.loads(line)["classes"]}


def test_weights_without_names_say_so(mapet, evaluate, val: Path, lab):
    """Published weights carry no class names: outputs are numbers, and a message says so."""
    outcome = mapet("train", "predict", PUBLISHED, val).ok()
    assert "carries no class names: its outputs are called by their numbers, 0 to 9" in outcome.stderr
    assert "--classes FILE" in outcome.stderr


def test_weights_without_names_and_class_folders(evaluate, animals: Path, tmp_path: Path):
    """A list of the outputs' names joins weights without names with class folders."""
    evaluate(PUBLISHED, animals).refused(
        1, "class names (ant, bee, cat)", "numbers, 0 to 9", "--classes FILE with the names of all 10 outputs"
    )
    names = listed(tmp_path / "names.txt", "dog", "cat", "bee", "ant", *"efghij")
    assert "24 of 3 classes" in evaluate(PUBLISHED, animals, "--classes", names).ok().stdout


def test_a_list_of_too_few_names(mapet, val: Path, tmp_path: Path):
    """A list that does not name every output is refused."""
    names = listed(tmp_path / "names.txt", "dog", "cat")
    mapet("train", "predict", PUBLISHED, val, "--classes", names).refused(1, "names 2 classes", "has 10 outputs")


def test_names_for_weights_with_names(mapet, tuned: Path, val: Path, tmp_path: Path):
    """Weights with class names keep them: predict refuses another list."""
    names = listed(tmp_path / "names.txt", "a", "b", "c")
    mapet("train", "predict", tuned, val, "--classes", names).refused(2, "have names already (ant, bee, cat)")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_weights_without_a_head(mapet, lab, val: Path, command: str):
    """Pre-trained weights have no head: both commands name those that help."""
    images = ["--val", val] if command == "evaluate" else [val]
    mapet("train", command, lab.run, *images).refused(1, "no head", "mapet train finetune", "mapet train probe")


def test_validation_images_without_labels(evaluate, tuned: Path, write_folder, picture, tmp_path: Path):
    """Images without labels cannot be evaluated."""
    images = write_folder(tmp_path / "images", {f"{at}.jpg": picture(at) for at in range(3)})
    evaluate(tuned, images).refused(1, "3 of the 3 images", "have no label", "--labels FILE")


def test_numbers_for_named_outputs(evaluate, tuned: Path, val: Path, tmp_path: Path):
    """Class numbers and named outputs are joined by a list only."""
    evaluate(tuned, val).refused(1, "class numbers (0, 1, 2 ...)", "have names (ant, bee, cat)", "--classes FILE")


def test_classes_that_are_no_outputs(evaluate, tuned: Path, write_folder, picture, tmp_path: Path):
    """Images of a class that is no output are refused, and some are named."""
    images = write_folder(tmp_path / "images", {f"{name}/1{name}.jpg": picture() for name in ("ant", "dog", "eel")})
    evaluate(tuned, images).refused(1, "2 of the 3 classes", "(dog, eel)", "ant, bee, cat")


def test_labels_that_count_from_one(evaluate, val: Path, tmp_path: Path):
    """Numbers from 1 to the number of outputs are recognised as shifted."""
    labels = listed(tmp_path / "labels.txt", *(1 + at % 10 for at in range(16)))
    evaluate(PUBLISHED, val, "--labels", labels).refused(1, "(10)", "seem to count from 1", "--labels FILE")


def test_a_subset_of_the_classes(evaluate, tuned: Path, write_folder, picture, tmp_path: Path):
    """Predictions are made among the outputs of a list, as for ImageNet-R."""
    images = write_folder(tmp_path / "images", {f"{name}/1{name}.jpg": picture() for name in ("ant", "cat")})
    subset = listed(tmp_path / "subset.txt", "cat", 0)
    outcome = evaluate(tuned, images, "--class-subset", subset, "--json").ok()
    assert json.loads(outcome.stdout)["protocol"]["outputs"] == 2
    assert [one["name"] for one in json.loads(outcome.stdout)["classes"]] == ["cat", "ant"]


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (["ant", "dog", "99"], ("2 of its 3 lines are no outputs", "(dog, 99)", "numbers from 0 to 2")),
        (["ant", "0"], ("lists output 0 (ant)", "list it once")),
        (["ant", "ant"], ("'ant' in lines 1 and 2",)),
        ([], ("holds no class names",)),
        (["ant", "bee"], ("1 of the 3 classes", "not among the 2 outputs in", "(cat)")),
    ],
)
def test_subsets_that_do_not_fit(evaluate, tuned: Path, animals: Path, tmp_path: Path, lines: list[str], parts):
    """A subset with something else than outputs, one twice, or without the images' classes is refused."""
    evaluate(tuned, animals, "--class-subset", listed(tmp_path / "subset.txt", *lines)).refused(1, *parts)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[[0]]", "the ReaL labels of 1 images and there are 24"),
        (json.dumps([[7]] * 24), "class number 7, and the weights have the outputs 0 to 2"),
        ("no JSON", "is not a list of ReaL labels"),
        (json.dumps([[]] * 24), "no label for any image"),
    ],
)
def test_real_labels_that_do_not_fit(evaluate, tuned: Path, animals: Path, tmp_path: Path, content: str, part: str):
    """ReaL labels of other images or outputs are refused."""
    (tmp_path / "real.json").write_text(content)
    evaluate(tuned, animals, "--real", tmp_path / "real.json").refused(1, "real.json", part)


def test_no_real_labels(evaluate, tuned: Path, animals: Path, tmp_path: Path):
    """A file of ReaL labels that does not exist is refused."""
    evaluate(tuned, animals, "--real", tmp_path / "real.json").refused(1, "real.json does not exist")


def test_real_labels_of_other_numbers_are_noticed(evaluate, tuned: Path, animals: Path, tmp_path: Path):
    """ReaL labels that hardly contain the images' own labels are measured with a warning."""
    (tmp_path / "real.json").write_text(json.dumps([[1]] * 8 + [[2]] * 8 + [[0]] * 8))
    outcome = evaluate(tuned, animals, "--real", tmp_path / "real.json").ok()
    assert "Only 0.0% of the labels are among the ReaL labels" in outcome.stderr
    assert "top-1, ReaL" in outcome.stdout


def test_an_unreadable_image(mapet, evaluate, tuned: Path, write_folder, picture, tmp_path: Path):
    """An unreadable image stops both commands with its name; predict can skip it."""
    files = {"ant/1.jpg": picture(1), "ant/2.jpg": picture(2)[:300], "bee/3.jpg": picture(3)}
    images = write_folder(tmp_path / "images", files)
    evaluate(tuned, images).refused(1, "image 'ant/2'")
    mapet("train", "predict", tuned, images, "--csv", tmp_path / "p.csv").refused(1, "image 'ant/2'")
    assert not (tmp_path / "p.csv").exists()
    outcome = mapet("train", "predict", tuned, images, "--on-error", "skip", "--json").ok()
    assert [json.loads(line)["key"] for line in outcome.stdout.splitlines()] == ["ant/1", "bee/3"]
    assert "Skipped 1 unreadable image" in outcome.stderr


@pytest.mark.parametrize(
    ("command", "options", "part"),
    [
        ("predict", ("--on-error", "cry"), "--on-error cry is unknown"),
        ("predict", ("--csv", "."), "is a folder; give a file"),
        ("evaluate", ("--html", "."), "is a folder; give a file"),
        ("evaluate", ("--key-until", "never"), "--key-until never"),
    ],
)
def test_options_that_do_not_fit(mapet, tuned: Path, animals: Path, command: str, options, part: str):
    """Options that do not fit are refused."""
    images = ["--val", animals] if command == "evaluate" else [animals]
    mapet("train", command, tuned, *images, *options).refused(2, part)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_weights_that_are_none(mapet, animals: Path, tmp_path: Path, command: str):
    """A path that holds no weights is refused."""
    images = ["--val", animals] if command == "evaluate" else [animals]
    mapet("train", command, tmp_path / "none", *images).refused(1, "does not exist")
    mapet("train", command, animals, *images).refused(1, "neither a run with a checkpoint")
