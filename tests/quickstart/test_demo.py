"""The demo on a few pictures of one's own: every chapter, offline, and again without doing anything twice."""

import json
from pathlib import Path

import mapet
import pytest
from mapet.quickstart.drawings import write_drawings
from mapet.shared.errors import DataError, UsageError
from PIL import Image


@pytest.mark.campaign
def test_the_demo_runs_on_ones_own_pictures_and_goes_on_where_it_was(tmp_path: Path, capfd: pytest.CaptureFixture):
    write_drawings(tmp_path / "mine", 60, seed=3)
    rows = mapet.demo(tmp_path / "mine", out=tmp_path / "out")
    said = capfd.readouterr()
    assert [row.features for row in rows] == ["pre-trained", "random init", "pixels 32x32"]
    assert "mapet tokenize build-codebook" in said.err
    assert "linear probe" in said.out
    assert said.out.index("classifier, fine-tuned") < said.out.index("classifier, from scratch")
    assert "labelled pictures in 4 epoch(s), with the same settings and seed 0" in said.err
    starts = [json.loads((tmp_path / "out" / name / "run.json").read_text()) for name in ("finetuned", "scratch")]
    assert starts[1]["init"] is None
    assert starts[0]["init"]["file"].startswith(str(tmp_path / "out" / "run"))
    assert starts[0]["keys_sha256"] == starts[1]["keys_sha256"]
    with Image.open(tmp_path / "out" / "tokens.png") as picture:
        assert picture.width > 300
    for page in ("tokens.html", "run.html"):
        assert f"\n  {tmp_path / 'out' / page}: " in said.err
        assert "data:image/webp;base64," in (tmp_path / "out" / page).read_text()
    checkpoint = tmp_path / "out" / "run" / "checkpoints"
    before = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    assert mapet.demo(tmp_path / "mine", out=tmp_path / "out") == rows
    assert {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")} == before


def test_the_demo_without_labels_still_makes_tokens_and_a_picture(tmp_path: Path, capfd: pytest.CaptureFixture):
    (tmp_path / "mine").mkdir()
    for number in range(20):
        Image.effect_noise((80, 60), 10 + number).convert("RGB").save(tmp_path / "mine" / f"{number}.png")
    assert mapet.demo(tmp_path / "mine", out=tmp_path / "out") == []
    assert "no labels" in capfd.readouterr().err
    assert (tmp_path / "out" / "tokens.png").exists()


def test_too_few_pictures_are_refused(tmp_path: Path):
    write_drawings(tmp_path / "mine", 5, seed=3)
    with pytest.raises(DataError, match="at least 20"):
        mapet.demo(tmp_path / "mine", out=tmp_path / "out")


def test_a_folder_that_holds_another_demo_is_refused(tmp_path: Path):
    (tmp_path / "source.txt").write_text("drawings, seed 0")
    with pytest.raises(UsageError, match="holds a demo of drawings, seed 0"):
        mapet.demo(out=tmp_path, seed=1)


@pytest.mark.parametrize("seed", [500, 3000])
def test_pictures_that_the_models_have_seen_are_refused(tmp_path: Path, seed: int):
    with pytest.raises(UsageError, match=f"--seed {seed} draws pictures on which"):
        mapet.demo(out=tmp_path / "out", seed=seed)
    assert not (tmp_path / "out").exists()
