"""The control that regresses a tower's features, from the command line."""

import json
from pathlib import Path

FEATURES = ("--set", "objective.target=features")


def pretrain(mapet, lab, out: Path, *options: object):
    return mapet(
        "train", "pretrain", "--images", lab.images, "--tokens", lab.tokens, "--out", out, *lab.settings, *options
    )


def test_features_as_targets(mapet, lab, tmp_path: Path):
    """objective.target=features with --teacher CODEBOOK trains, and the summary shows a cosine similarity."""
    outcome = pretrain(mapet, lab, tmp_path / "run", *FEATURES, "--teacher", lab.codebook).ok()
    assert "cosine similarity" in outcome.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["teacher"] == str(lab.codebook)


def test_features_without_a_teacher(mapet, lab, tmp_path: Path):
    """objective.target=features alone: the sentence names --teacher and whose codebook it takes."""
    refused = pretrain(mapet, lab, tmp_path / "run", *FEATURES)
    refused.refused(2, "objective.target=features", "--teacher", "that of the tokens")


def test_a_teacher_of_tokens(mapet, lab, tmp_path: Path):
    """--teacher for a run on tokens would be ignored, so it is refused."""
    refused = pretrain(mapet, lab, tmp_path / "run", "--teacher", lab.codebook)
    refused.refused(2, "--teacher", "objective.target=features only")


def test_a_teacher_that_is_no_codebook(mapet, lab, tmp_path: Path):
    """--teacher of a folder that does not exist, or an empty one."""
    pretrain(mapet, lab, tmp_path / "run", *FEATURES, "--teacher", tmp_path / "none").refused(1, "none does not exist")
    pretrain(mapet, lab, tmp_path / "run", *FEATURES, "--teacher", "").refused(2, "--teacher is empty")


def test_an_unknown_target(mapet, lab, tmp_path: Path):
    """objective.target=pixels: the targets there are."""
    refused = pretrain(mapet, lab, tmp_path / "run", "--set", "objective.target=pixels")
    refused.refused(2, "objective.target 'pixels' is unknown", "tokens, features")


def test_a_bench_of_features(mapet, tmp_path: Path):
    """mapet bench has no tower to regress and says so."""
    options = ("--set", "objective.target=features", "--set", "model.name=vit-tiny")
    mapet("bench", *options).refused(2, "objective.target=features", "--teacher")
