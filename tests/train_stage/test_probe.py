"""The probe measures what features carry: everything, nothing, or what it says."""

from pathlib import Path

import pytest
import torch
from mapet.quickstart.drawings import write_drawings
from mapet.shared.errors import DataError
from mapet.train_stage.evaluation.knn import knn
from mapet.train_stage.evaluation.linear_probe import linear_probe
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.probe import probe

ORACLE = Path(__file__).parent / "oracle"


def clusters(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, 8, generator=generator), labels


def test_separable_features_are_told_apart_and_noise_is_not():
    near, noise = clusters(400, 0.1, 1), clusters(400, 100.0, 3)
    assert linear_probe(*near, *clusters(400, 0.1, 2)) > 0.99
    assert knn(*near, *clusters(400, 0.1, 2)) > 0.99
    assert linear_probe(*noise, *clusters(400, 100.0, 4)) < 0.35
    assert knn(*noise, *clusters(400, 100.0, 4)) < 0.35


def test_the_linear_probe_does_as_well_as_the_best_possible_classifier():
    train, test = clusters(2000, 0.7, 1), clusters(2000, 0.7, 2)
    centres = torch.stack([train[0][train[1] == label].mean(0) for label in range(5)])
    best = (torch.cdist(test[0], centres).argmin(1) == test[1]).float().mean().item()
    assert linear_probe(*train, *test) == pytest.approx(best, abs=0.02)


def test_a_run_is_probed_beside_random_init_and_pixels(chain, tmp_path: Path):
    overrides = ["model.name=null", "model.dim=32", "model.depth=2", "model.heads=2", "model.image_size=64"]
    overrides += ["optimizer.warmup_epochs=0", "model.patch_size=8", "train.epochs=1", "train.batch_size=32"]
    pretrain(chain.images, chain.tokens, tmp_path / "run", overrides=overrides)
    write_drawings(tmp_path / "val", 32, seed=8)
    rows = probe(tmp_path / "run", chain.images, tmp_path / "val", random_init=True, pixels=True)
    assert [row.features for row in rows] == ["pre-trained", "random init", "pixels 32x32"]
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


def test_a_published_checkpoint_can_be_probed(chain):
    assert len(probe(ORACLE / "pretrain.pth.tar", chain.images, chain.images)) == 1


def test_images_without_labels_are_refused(chain, tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    with pytest.raises(DataError, match="no label"):
        probe(ORACLE / "pretrain.pth.tar", chain.images, tmp_path)
