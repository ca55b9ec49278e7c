"""mapet study as a whole: steps by real commands, killed and shared."""

import csv
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from mapet.shared.errors import DataError, UsageError
from mapet.shared.storage.lock import claimed
from mapet.studies.schema import STUDIES, read_study
from mapet.studies.study import _inputs, study
from msgspec.structs import replace

from ..warm import COLD_COMMAND

COMMAND = [*COLD_COMMAND, "study"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke study with one budget."""
    content = yaml.safe_load((STUDIES / "smoke.yaml").read_text())
    content["budgets"] = {"images": {"images": 160}}
    path = tmp_path_factory.mktemp("study") / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def scores(out: Path) -> list[tuple[str, ...]]:
    with (out / "results.csv").open() as file:
        return [
            (one["row"], one["budget"], one["seed"], one["evaluation"], one["top1"]) for one in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def smaller(small: Path) -> Path:
    """With one objective."""
    content = yaml.safe_load(small.read_text())
    content["objectives"] = {content["baseline"]: content["objectives"][content["baseline"]]}
    path = small.with_name("smaller.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def undisturbed(smaller: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scipy", reason="no scipy: differences have no intervals")
    out = tmp_path_factory.mktemp("undisturbed") / "study"
    study(smaller, out)
    return out


@pytest.mark.campaign
def test_a_study_measures_every_cell(small: Path, tmp_path: Path):
    # 2 objectives and 2 comparisons, 2 seeds, 2 evaluations.
    pytest.importorskip("scipy", reason="no scipy: differences have no intervals")
    out = tmp_path / "study"
    study(small, out)
    rows = [line for line in scores(out) if line[3] in ("linear", "knn")]
    assert len(rows) == len(scores(out)) == 16
    assert all(0 <= float(line[-1]) <= 1 for line in rows)
    table = (out / "results.md").read_text()
    assert table.count("\n| k-CLIP |") == 4
    assert "measure once on VAL" in table
    assert (out / "results.tex").read_text().count(r"MIM 40 \%") == 1
    assert "<!doctype html>" in (out / "results.html").read_text()
    assert len(list(out.glob("run/*/report.html"))) == 4
    summaries = json.loads((out / "results.json").read_text())["summaries"]
    assert [one["row"] for one in summaries] == ["MIM 40 %", "MaPeT", "random init", "pixels"]
    assert summaries[0]["differences"] == {}
    assert summaries[1]["differences"]["linear"]["pairs"] == 2


@pytest.mark.nightly
def test_every_evaluation_and_comparison_is_measured(tmp_path: Path):
    # One seed has no intervals. 240 images are two epochs, and the k-NN accuracy is measured twice on the way. Two
    # processes share each command, and one row regresses features.
    content = yaml.safe_load((STUDIES / "smoke.yaml").read_text())
    content |= {"drawings": {"train": 120, "val": 60}, "budgets": {"images": {"images": 240}}, "seeds": [0]}
    content |= {"evaluations": ["linear", "attentive", "knn", "finetuned"], "curve_points": 2}
    content |= {"comparisons": ["random init", "from scratch", "pixels"], "finetuning_recipe": "finetune-small-data"}
    content["settings"] |= {"train.batch_size": 24}
    content["objectives"]["features"] = {"objective.name": "mim", "objective.target": "features"}
    content["finetuning"] = {"train.epochs": 1, "train.batch_size": 24, "optimizer.warmup_epochs": 0}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(content))
    out = tmp_path / "study"
    subprocess.run([*COMMAND, tmp_path / "all.yaml", "--out", out, "--processes", "2"], check=True)
    measured = {(row, evaluation) for row, _, _, evaluation, _ in scores(out)}
    frozen = {"linear", "attentive", "knn"}
    assert measured == {
        *((row, evaluation) for row in content["objectives"] for evaluation in (*frozen, "finetuned")),
        *((row, evaluation) for row in ("random init", "pixels") for evaluation in frozen),
        ("from scratch", "finetuned"),
    }
    curves = [len(path.read_text().splitlines()) for path in out.glob("run/*/output/probe.jsonl")]
    assert len(curves) == 3
    assert min(curves) >= 2
    records = [json.loads(path.read_text()) for path in out.glob("run/*/output/run.json")]
    assert [record["processes"] for record in records] == [2, 2, 2]


@pytest.mark.nightly
def test_what_a_shared_command_says_is_in_the_error_and_not_the_report_of_torchrun(smaller: Path, tmp_path: Path):
    content = yaml.safe_load(smaller.read_text())
    content["tokenizers"]["k-CLIP"]["codebook"] |= {"tower": "local-dir:nowhere", "layer": 1}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(
        DataError, match=r"log\.txt: the command of this step ended with exit code 1 \(.*nowhere"
    ) as said:
        study(tmp_path / "wrong.yaml", tmp_path / "study", processes=2)
    assert "torch" not in str(said.value)


@pytest.mark.nightly
def test_a_study_that_is_killed_at_random_ends_with_the_same_figures(smaller: Path, undisturbed: Path, tmp_path: Path):
    out, moments = tmp_path / "study", random.Random(0)
    for _ in range(20):
        process = subprocess.Popen([*COMMAND, smaller, "--out", out], start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(2, 15))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*COMMAND, smaller, "--out", out], check=True)
    assert scores(out) == scores(undisturbed)


@pytest.mark.nightly
def test_two_processes_share_a_study_and_end_with_the_same_figures(smaller: Path, undisturbed: Path, tmp_path: Path):
    out = tmp_path / "study"
    pair = [subprocess.Popen([*COMMAND, smaller, "--out", out], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert scores(out) == scores(undisturbed)
    made = [{line.split(":")[0] for line in text.splitlines() if ": mapet t" in line} for text in said]
    assert made[0]
    assert made[1]
    assert not made[0] & made[1]


def test_a_claim_is_not_waited_for(tmp_path: Path):
    with claimed(tmp_path / "step") as first, claimed(tmp_path / "step") as second:
        assert (first, second) == (True, False)
    with claimed(tmp_path / "step") as again:
        assert again


def test_processes_are_at_least_one_and_torchrun_is_started_by_the_study(small: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(UsageError, match="--processes 0 must be at least 1"):
        study(small, tmp_path / "out", processes=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="torchrun with more than one process is not supported"):
        study(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_are_given_exactly_where_the_study_draws_none(small: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="draws its own images; leave out --images and --val"):
        study(small, tmp_path / "out", images="a", val="b")
    content = yaml.safe_load(small.read_text())
    del content["drawings"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match="needs images: give --images and --val"):
        study(tmp_path / "other.yaml", tmp_path / "out", images="a")
    assert not (tmp_path / "out").exists()


def test_a_study_that_an_earlier_version_noted_is_the_same_study(smaller: Path, tmp_path: Path):
    # It noted only the fields that it had.
    plan = read_study(smaller)
    first = _inputs(plan, tmp_path, None, None, "cpu")
    noted = json.loads((tmp_path / "study.json").read_text())
    del noted["study"]["finetuning_of"], noted["study"]["tokenizers"]["k-CLIP"]["published"]
    (tmp_path / "study.json").write_text(json.dumps(noted))
    assert _inputs(plan, tmp_path, None, None, "cpu") == first
    with pytest.raises(UsageError, match="holds another study"):
        _inputs(replace(plan, seeds=[7]), tmp_path, None, None, "cpu")
