"""The YAML file of a study: what is refused, and with which sentence."""

from pathlib import Path

import pytest
import yaml
from mapet.shared.errors import DataError, UsageError
from mapet.studies.schema import STUDIES, read_study

SMOKE = yaml.safe_load((STUDIES / "smoke.yaml").read_text())


def written(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**SMOKE, **changes}))
    return path


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_is_read_by_its_name(path: Path):
    assert read_study(path.stem) == read_study(path)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"baseline": "BEiT"}, ("baseline 'BEiT' is none of the objectives", "MIM 40 %, MaPeT")),
        ({"seeds": [1, 1]}, ("seeds has a number twice",)),
        ({"seeds": []}, ("seeds",)),
        ({"evaluations": ["linear", "linear"]}, ("evaluations has a name twice",)),
        ({"evaluations": ["svm"]}, ("evaluations", "svm")),
        ({"budgets": {"both": {"images": 10, "flops": 1.0}}}, ("budgets", "either images or flops")),
        ({"budgets": {"none": {}}}, ("budgets", "either images or flops")),
        ({"comparisons": ["from scratch"]}, ("'from scratch' needs the evaluation finetuned",)),
        ({"evaluations": ["finetuned"]}, ("need linear, attentive or knn",)),
        ({"tokenizer": {}}, ("unknown field tokenizer",)),
        ({"tokenizers": {"a": {"codebook": {"clusters": 4}}}}, ("tokenizers.a", "no option 'clusters'", "iterations")),
        ({"tokenizers": {"a": {"tokens": {"out": "x"}}}}, ("tokenizers.a", "no option 'out'")),
    ],
)
def test_a_wrong_study_is_refused_in_one_sentence_that_names_file_and_field(tmp_path: Path, changes, parts):
    path = written(tmp_path, **changes)
    with pytest.raises(DataError) as refused:
        read_study(path)
    sentence = str(refused.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    assert [part for part in parts if part not in sentence] == []


def test_an_unknown_name_is_refused_with_the_shipped_ones():
    with pytest.raises(UsageError, match=r"STUDY large is no file and no shipped study; choose from .*smoke"):
        read_study("large")
