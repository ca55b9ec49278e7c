"""The probe measures the frozen features of a run and of what it is compared with."""

import json
from pathlib import Path

import pytest
import torch
from mapet.quickstart.drawings import write_drawings
from mapet.shared.errors import DataError, UsageError
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.probe import probe, show

pytestmark = pytest.mark.usefixtures("short_fits")

ORACLE = Path(__file__).parent / "oracle"


def test_a_run_is_probed_beside_random_init_and_pixels(chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = ["model.name=null", "model.dim=32", "model.depth=2", "model.heads=2", "model.image_size=64"]
    overrides += ["optimizer.warmup_epochs=0", "model.patch_size=8", "train.epochs=1", "train.batch_size=32"]
    pretrain(chain.images, chain.tokens, tmp_path / "run", overrides=overrides)
    write_drawings(tmp_path / "val", 32, seed=8)
    rows = probe(tmp_path / "run", chain.images, tmp_path / "val", random_init=True, pixels=True)
    show(rows)
    assert [row.features for row in rows] == ["pre-trained", "random init", "pixels 32x32"]
    table = capsys.readouterr().out
    for row in rows:
        assert row.features in table
        assert (row.linear, row.knn) == tuple(result.numbers["top1"] for result in row.evaluations[:2])
        assert [result.name for result in row.evaluations] == ["linear", "knn", "knn-not-centred"]
        assert {result.protocol["features"]["encoder"] for result in row.evaluations} == {row.features}
    assert all(0 <= row.linear <= 1 and 0 <= row.knn <= 1 for row in rows)
    assert probe(tmp_path / "run", chain.images, chain.images)[0].knn > 0.5  # every image's nearest is itself


def test_random_init_is_what_the_run_started_from(chain, tmp_path: Path):
    overrides = ["model.name=null", "model.dim=32", "model.depth=2", "model.heads=2", "model.image_size=64"]
    overrides += ["model.patch_size=8", "train.epochs=1", "train.batch_size=32", "train.seed=3"]
    still = [f"optimizer.{name}=1e-12" for name in ("lr", "min_lr", "warmup_lr")] + ["optimizer.warmup_epochs=0"]
    pretrain(chain.images, chain.tokens, tmp_path / "run", overrides=[*overrides, *still])
    write_drawings(tmp_path / "val", 64, seed=8)
    trained, fresh = probe(tmp_path / "run", chain.images, tmp_path / "val", random_init=True)
    assert (trained.linear, trained.knn) == (fresh.linear, fresh.knn)


def test_a_probe_leaves_the_callers_random_state_alone(chain):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    probe(ORACLE / "pretrain.pth.tar", chain.images, chain.images, random_init=True)
    assert torch.equal(torch.rand(3), expected)


def test_a_published_checkpoint_can_be_probed(chain):
    assert len(probe(ORACLE / "pretrain.pth.tar", chain.images, chain.images)) == 1


def test_everything_is_measured_on_request_and_printed_as_a_table_or_as_json(
    chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_drawings(tmp_path / "val", 24, seed=8)
    rows = probe(
        ORACLE / "pretrain.pth.tar",
        chain.images,
        tmp_path / "val",
        pixels=True,
        everything=True,
        low_shot=["10%", "20%"],
        block="best",
        iterations=3,
    )
    model, pixels = rows
    assert list(model.low_shot) == ["10%", "20%", "1%"]
    assert model.choice is not None
    assert (model.block, pixels.block, pixels.choice) == (model.choice.block, None, None)
    capsys.readouterr()
    show(rows)
    tables = capsys.readouterr().out
    assert model.attentive is not None
    assert model.rankme is not None
    columns = ("linear probe", "attentive probe", "k-NN", "20% of labels", "RankMe", "k = 10", "chosen k", "block")
    for words in (*columns, f"{model.attentive:.1%}", f"{model.rankme:.1f}", "pixels 32x32"):
        assert words in tables
    show(rows, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"rows": [row.to_json() for row in rows]}
    names = [result["name"] for result in printed["rows"][0]["evaluations"]]
    low_shot = ["low-shot 10%", "low-shot 20%", "low-shot 1%"]
    assert names == ["linear", "attentive", "knn", "knn-not-centred", *low_shot, "rankme"]


def test_a_block_that_is_named_is_measured_for_every_model(chain):
    weights = ORACLE / "pretrain.pth.tar"
    rows = probe(weights, chain.images, chain.images, random_init=True, block=0)
    assert [row.block for row in rows] == [0, 0]
    for row in rows:
        assert "block 0 (0 to 1)" in row.evaluations[0].protocol["features"]["feature"]
    (last,) = probe(weights, chain.images, chain.images)
    assert (last.block, last.evaluations[0].protocol["features"]["feature"]) == (
        1,
        "mean over patches of the final norm's output",
    )
    with pytest.raises(UsageError, match="give best, last or a number from 0 to 1"):
        probe(weights, chain.images, chain.images, block=2)


def test_images_without_labels_are_refused(chain, tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="no label"):
        probe(ORACLE / "pretrain.pth.tar", chain.images, tmp_path)
