"""Features of patches are those of the model, in a temporary file that disappears."""

import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from mapet.shared.errors import DataError
from mapet.train_stage.evaluation import patch_features
from mapet.train_stage.evaluation.embed import (
    Execution,
    embed,
    embed_blocks,
    extract_features,
    normalised_views,
    pixel_encoder,
    pooled_encoder,
)
from mapet.train_stage.evaluation.labelled import labelled_images
from mapet.train_stage.evaluation.patch_features import PatchWriter
from mapet.train_stage.weights.read import load_weights

PUBLISHED = Path(__file__).parent.parent / "oracle"


def test_patch_features_are_those_of_the_model_as_float16(chain):
    weights, images = load_weights(PUBLISHED / "pretrain.pth.tar"), labelled_images(chain.images)
    val = images.subset(7)
    encoders = [pooled_encoder(weights, "cpu"), pixel_encoder(8)]
    features, pixels = extract_features(
        encoders, weights.preprocess, images, val, Execution(batch_size=40), patches=True
    )
    (views,) = normalised_views(val.records, weights.preprocess, 7, 0, "cpu")
    pooled, expected = embed(weights.vit(), views)
    assert features.val_patches is not None
    assert torch.equal(features.val_patches.rows([5, 2]), expected[[5, 2]].half().float())
    assert torch.allclose(features.val, pooled, atol=1e-5)
    assert features.train_patches is not None
    assert (len(features.train_patches), features.train_patches.shape) == (96, (16, 48))
    assert features.train_keys == tuple(record.key for record in images.records)
    assert pixels.train_patches is not None
    assert pixels.train_patches.shape == (4, 48)
    averaged = pixels.train_patches.rows([0]).mean().item()
    assert averaged == pytest.approx(pixels.train[0].mean().item(), abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_features_of_a_block_are_its_output_after_the_models_norm_and_pooling(kind: str):
    model = load_weights(PUBLISHED / f"{kind}.pth.tar").vit()
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = model.forward_features(pixels)
    pooled, patches = embed(model, pixels)
    assert torch.equal(pooled, model.forward_head(rows, pre_logits=True))
    assert torch.equal(patches, rows[:, 1:])
    first, last = embed_blocks(model, pixels, [0, 1])
    assert torch.equal(last[0], pooled)
    model.blocks = model.blocks[:1]
    assert torch.equal(first[0], model.forward_head(model.forward_features(pixels), pre_logits=True))


def test_too_little_room_for_patch_features_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(patch_features.shutil, "disk_usage", lambda folder: usage(1000))
    writer = PatchWriter(1000)
    with pytest.raises(DataError, match=r"The patch features of 1,000 images take 256 kB in the temporary folder"):
        writer.write(torch.zeros(2, 8, 16, dtype=torch.float16))


def test_the_temporary_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writer = PatchWriter(2)
    writer.write(torch.ones(2, 8, 16, dtype=torch.float16))
    features = writer.finish()
    assert list(tmp_path.iterdir()) == []
    assert features.rows([1]).sum() == 8 * 16
