"""The probe measures the frozen features of a run and of what it is compared with."""

from pathlib import Path

import pytest
import torch
from mapet.quickstart.drawings import write_drawings
from mapet.shared.errors import DataError
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.probe import probe, show

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
        assert (row.linear, row.knn) == tuple(result.numbers["top1"] for result in row.evaluations)
        assert [result.name for result in row.evaluations] == ["linear", "knn"]
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


def test_images_without_labels_are_refused(chain, tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="no label"):
        probe(ORACLE / "pretrain.pth.tar", chain.images, tmp_path)
