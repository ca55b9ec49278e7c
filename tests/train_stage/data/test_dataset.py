"""Training on tokenised tars alone: no --images, and not one bit different."""

import json
import shutil
from pathlib import Path

import pytest
from mapet.shared.errors import DataError, UsageError
from mapet.shared.sources.sources import open_source
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.train_stage.data.batch import LoadBatch
from mapet.train_stage.data.join import join
from mapet.train_stage.features import features
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.probe import probe
from mapet.train_stage.settings import resolve

SETTINGS = ["model.name=null", "model.dim=32", "model.depth=2", "model.heads=2", "model.image_size=64"]
SETTINGS += ["model.patch_size=8", "train.epochs=2", "train.batch_size=16", "optimizer.warmup_epochs=0"]
SETTINGS += ["train.log_every=1"]


@pytest.fixture(scope="module")
def tars(chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain's store in the tar format, far from the images it was made of; not to be changed."""
    out = tmp_path_factory.mktemp("tars") / "store"
    encode_shards(chain.images, chain.codebook, out, batch_size=16, format="webdataset")
    return out


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_losses_and_weights_are_those_of_the_original_images(chain, tars: Path, tmp_path: Path):
    ours = pretrain(None, tars, tmp_path / "tars", overrides=SETTINGS, device="cpu")
    theirs = pretrain(chain.images, chain.tokens, tmp_path / "images", overrides=SETTINGS, device="cpu")
    assert losses(tmp_path / "tars") == losses(tmp_path / "images")
    assert len(losses(tmp_path / "tars")) == 12
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    pretrain(chain.images, chain.tokens, tmp_path / "tars", overrides=SETTINGS, device="cpu")  # the very same run


def test_a_store_without_images_needs_them(chain, tmp_path: Path):
    with pytest.raises(UsageError, match="holds no images, only their tokens; give --images"):
        pretrain(None, chain.tokens, tmp_path / "run", overrides=SETTINGS, device="cpu")
    assert not (tmp_path / "run").exists()


def test_an_image_that_changed_inside_its_tar_stops_the_loader(tars: Path, tmp_path: Path):
    store = TokenStore(shutil.copytree(tars, tmp_path / "store"))
    data = join(None, store)
    record = data.record(7)
    content = bytearray(record.path.read_bytes())
    content[record.offset + 100] ^= 1
    record.path.write_bytes(content)
    with pytest.raises(DataError, match=f"image '{record.key}' is not the one that was encoded"):
        LoadBatch(data, resolve(None, SETTINGS))([(0, 7)])


def test_probe_and_features_take_tokenised_tars_as_images(run: Path, chain, tars: Path, tmp_path: Path):
    shards = tars / "shards"
    for ours, theirs in zip(open_source(shards), open_source(chain.images), strict=True):
        assert [(r.key, r.length, r.label) for r in ours.index()] == [
            (r.key, r.length, r.label) for r in theirs.index()
        ]
    assert probe(run, shards, shards) == probe(run, chain.images, chain.images)
    features(shards, run, tmp_path / "ours.zarr")
    features(chain.images, run, tmp_path / "theirs.zarr")

    def values(name: str) -> dict[str, bytes]:
        root = tmp_path / name
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("c/**/*") if p.is_file()}

    assert values("ours.zarr") == values("theirs.zarr") != {}
