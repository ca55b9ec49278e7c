"""Weights in the package open under their name wherever weights are taken."""

import json
from pathlib import Path

import mapet
import pytest
import torch
from mapet.quickstart.drawings import write_drawings
from mapet.quickstart.train_weights import SETTINGS
from mapet.shared.errors import DataError

NAME = "mapet-drawings-tiny"


def test_they_open_under_their_name_as_a_model_of_timm():
    vit = mapet.load(NAME)
    rows = vit.forward_features(torch.zeros(2, 3, 64, 64))
    assert rows.shape == (2, 65, 128)
    assert not vit.training
    weights = mapet.load_weights(NAME)
    assert (weights.shape.dim, weights.shape.depth, weights.shape.heads) == tuple(
        SETTINGS[f"model.{name}"] for name in ("dim", "depth", "heads")
    )


@pytest.mark.usefixtures("short_fits")
def test_they_are_better_than_random_weights(tmp_path: Path):
    write_drawings(tmp_path / "train", 200, seed=20)
    write_drawings(tmp_path / "val", 120, seed=21)
    trained, random_init = mapet.probe(NAME, tmp_path / "train", tmp_path / "val", random_init=True)
    assert trained.linear > random_init.linear + 0.1  # 0.31 and 0.11


def test_a_run_starts_from_them_and_records_their_digest(chain, tmp_path: Path):
    settings = [f"{key}={value}" for key, value in SETTINGS.items()] + ["train.epochs=1"]
    mapet.pretrain(chain.images, chain.tokens, tmp_path / "run", init=NAME, overrides=settings)
    start = json.loads((tmp_path / "run" / "run.json").read_text())["init"]
    assert start["sha256"] == mapet.load_weights(NAME).sha256()


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir()
    with pytest.raises(DataError, match=f"{NAME} is neither a run"):
        mapet.load(NAME)


def test_another_name_is_refused_with_those_that_there_are():
    with pytest.raises(DataError, match=rf"mapet-drawings-huge does not exist; .* \({NAME}\)"):
        mapet.load("mapet-drawings-huge")
