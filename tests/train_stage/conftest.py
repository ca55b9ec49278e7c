"""A run of the training stage that tests of finished weights share."""

from pathlib import Path

import pytest
from mapet.train_stage.pretrain import pretrain

TINY = ["model.name=null", "model.dim=32", "model.depth=2", "model.heads=2", "model.image_size=64"]
SHORT = ["model.patch_size=8", "train.epochs=2", "train.batch_size=32", "optimizer.warmup_epochs=0", "train.seed=3"]


@pytest.fixture
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear probes end after a tenth of their iterations, where accuracy is not what is tested."""
    monkeypatch.setattr("mapet.train_stage.probing.linear_probe._ITERATIONS", 10)


@pytest.fixture(scope="session")
def run(chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the chain's images: 64 px, patch 8, dim 32, depth 2; normalised by values of its own."""
    out = tmp_path_factory.mktemp("finished") / "run"
    of_its_own = ["data.mean=[0.4,0.5,0.6]", "data.std=[0.2,0.25,0.3]", "data.interpolation=bilinear"]
    pretrain(chain.images, chain.tokens, out, overrides=[*TINY, *SHORT, *of_its_own])
    return out
