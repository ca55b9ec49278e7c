"""Situations of studies: plans, and files with something wrong, each refused before anything is made."""

import json
from pathlib import Path

import pytest
import yaml
from mapet.studies.schema import STUDIES

PIXELS = {"pixels": {"codebook": {"tower": "pixels:8", "image_size": 64, "k": 16}}}
SMALL = {"train.batch_size": 32, "train.epochs": 30}


@pytest.fixture
def written(tmp_path: Path):
    """written(**changes): the file of the smoke study on tokens of pixels, changed."""

    def write(**changes: object) -> Path:
        content = yaml.safe_load((STUDIES / "smoke.yaml").read_text())
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({**content, "tokenizers": PIXELS, **changes}))
        return path

    return write


def test_a_plan(mapet, written, tmp_path):
    """--dry-run without --out: a table with hours, or JSON; nothing is written."""
    path = written()
    shown = mapet("study", path, "--dry-run", "--flops-per-second", "1e10", cwd=tmp_path).ok().stdout
    for word in ("token stores", "pre-trainings", "total", "hours", "nothing was written"):
        assert word in shown
    found = json.loads(mapet("study", path, "--dry-run", "--json", cwd=tmp_path).ok().stdout)
    assert found["steps"]["run"]["steps"] == 8
    assert found["steps"]["total"]["hours"] is None
    assert [one.name for one in tmp_path.iterdir()] == ["mine.yaml"]


def test_options_that_do_not_fit(mapet, written, tmp_path):
    """No --out, a rate without --dry-run, a rate of zero, a study that does not exist."""
    path = written()
    mapet("study", path).refused(2, "--out is missing", "--dry-run")
    mapet("study", path, "--out", tmp_path / "x", "--flops-per-second", 1).refused(2, "goes with --dry-run")
    mapet("study", path, "--dry-run", "--flops-per-second", 0).refused(2, "--flops-per-second 0 must be a positive")
    mapet("study", "papers", "--dry-run").refused(2, "papers is no file and no shipped study", "paper-imagenet")
    mapet("study", "tiny", "--dry-run").refused(2, "give --images, or train_images")


def test_a_mistake_leaves_no_study_behind(mapet, written, tmp_path):
    """A wrong setting is refused without a picture drawn or a note of the study, so that --out may be used again."""
    path = written(objectives={"MIM 40 %": {"objective.mask_ratio": 40}})
    mapet("study", path, "--out", tmp_path / "out").refused(2, "MIM 40 %", "mask_ratio 40")
    assert [one for one in (tmp_path / "out").rglob("*") if one.suffix in (".json", ".tar", ".jpg", ".png")] == []


@pytest.mark.parametrize(
    ("changes", "code", "parts"),
    [
        ({"objectives": {"MIM 40 %": {"objective.nam": "mim"}}}, 2, ("objective MIM 40 %", "objective.nam")),
        ({"objectives": {"MIM 40 %": {"objective.query_rows": 0}}}, 2, ("MIM 40 %", "query_rows must be at least 1")),
        ({"objectives": {"MIM 40 %": {"objective.mask_ratio": 40}}}, 2, ("MIM 40 %", "mask_ratio 40")),
        ({"objectives": {"MIM 40 %": "mim"}}, 1, ("mine.yaml", "objectives")),
        ({"models": {"mini": {"model.name": "vit-nano"}}}, 2, ("model mini", "vit-nano")),
        ({"budgets": {"few": {"images": 10}}}, 2, ("budget few", "give at least one epoch")),
        ({"budgets": {"x": {"images": 320, "flops_of": "PIM"}}}, 1, ("flops_of 'PIM' is none of the objectives",)),
        ({"budgets": {"x": {"flops": 1.0e9, "flops_of": "MaPeT"}}}, 1, ("flops_of has images, not flops",)),
        ({"tokenizers": {"a": {"codebook": {"k": "many"}}}}, 1, ("tokenizers.a.codebook.k is 'many'", "whole number")),
        ({"tokenizers": {"a": {"published": {"image_size": 112}}}}, 1, ("give either vqkd or dvae",)),
        ({"tokenizers": {"a": {"published": {"dvae": "e.pkl"}, "codebook": {"k": 4}}}}, 1, ("codebook or published",)),
        ({"evaluations": ["finetuned", "knn"]}, 2, ("fine-tuning: train.batch_size 512", "160 training images")),
        ({"finetuning_of": {"large": SMALL}}, 1, ("finetuning_of 'large' is none of the models: mini",)),
        ({"seeds": ["first"]}, 1, ("mine.yaml", "seeds")),
        ({"settings": {"train.batch_size": 500}}, 2, ("train.batch_size 500 is larger than the 160",)),
    ],
)
def test_what_is_wrong_in_the_file(mapet, written, tmp_path, changes, code, parts):
    """A wrong field or setting ends with one sentence, before a picture is drawn or a folder made."""
    mapet("study", written(**changes), "--dry-run").refused(code, *parts)
    assert not (tmp_path / "out").exists()
