"""Features on disk are those of the model, stand beside their keys, and appear only when complete."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import zarr
from mapet.shared.errors import DataError, UsageError
from mapet.shared.sources.sources import read_records
from mapet.shared.storage.files import sha256_file
from mapet.train_stage.export import export
from mapet.train_stage.features import features
from mapet.train_stage.import_weights import import_weights
from mapet.train_stage.weights.checkpoint import newest_checkpoint
from PIL import Image

ORACLE = Path(__file__).parent / "oracle"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    return {name: array[:] for name, array in zarr.open_group(path, mode="r").arrays()}


def largest_error(actual: np.ndarray, expected: torch.Tensor) -> float:
    return ((torch.tensor(actual) - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes, none of them the input size of a model, in two class folders."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate([(70, 200), (300, 81), (64, 64), (33, 40), (500, 499)]):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        folder = root / ("even", "odd")[number % 2]
        folder.mkdir(exist_ok=True)
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return root


@torch.no_grad()
def by_timm(exported: Path, pictures: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(pooled, patches) by timm alone: its own model, its own preprocessing."""
    model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = torch.stack([transform(Image.open(path)) for path in sorted(pictures.rglob("*.png"))])
    rows = model.forward_features(images)
    grid = model.patch_embed.grid_size
    return model.forward_head(rows, pre_logits=True), rows[:, 1:].unflatten(1, grid)


@pytest.mark.parametrize("kind", ["run", "finetune"])
@pytest.mark.parametrize("image_size", [None, 96])
def test_features_are_what_timm_makes_of_the_same_pictures(
    kind: str, image_size: int | None, run: Path, pictures: Path, tmp_path: Path
):
    weights = run if kind == "run" else ORACLE / "finetune.pth.tar"
    pooled, patches = by_timm(export(weights, tmp_path / "timm", image_size=image_size), pictures)
    arrays = read_arrays(features(pictures, weights, tmp_path / "features.zarr", image_size=image_size, batch_size=2))
    assert list(arrays["keys"]) == ["even/0", "even/2", "even/4", "odd/1", "odd/3"]
    assert arrays["labels"].tolist() == [0, 0, 0, 1, 1]
    assert arrays["pooled"].dtype == arrays["patches"].dtype == np.float32
    assert arrays["patches"].shape == patches.shape
    assert largest_error(arrays["pooled"], pooled) < 1e-5
    assert largest_error(arrays["patches"], patches) < 1e-5


def test_the_group_says_what_made_it(run: Path, pictures: Path, tmp_path: Path):
    attributes = zarr.open_group(features(pictures, run, tmp_path / "a.zarr"), mode="r").attrs
    tensors = newest_checkpoint(run) / "model.safetensors"
    assert attributes["weights"] == {"path": str(tensors), "sha256": sha256_file(tensors), "kind": "pretraining"}
    assert (attributes["format"], attributes["version"], attributes["grid"]) == ("mapet-features", 1, [8, 8])
    assert (attributes["shape"]["dim"], attributes["shape"]["image_size"]) == (32, 64)
    assert attributes["preprocess"] == {
        "image_size": 64,
        "resize": "shortest",
        "resize_size": 64,
        "interpolation": "bilinear",
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
    }


def test_rows_are_in_the_sources_order_whatever_the_batches(chain, run: Path, tmp_path: Path):
    records = read_records(chain.images)
    odd = read_arrays(features(chain.images, run, tmp_path / "odd.zarr", batch_size=7))
    whole = read_arrays(features(chain.images, run, tmp_path / "whole.zarr", batch_size=96, workers=2))
    assert list(odd["keys"]) == list(whole["keys"]) == [record.key for record in records]
    assert odd["labels"].tolist() == [record.label for record in records]
    for name in ("pooled", "patches"):
        assert largest_error(odd[name], torch.tensor(whole[name])) < 1e-5
    assert len(np.unique(whole["pooled"], axis=0)) == len(records)


def test_every_form_of_the_same_weights_gives_the_same_features(run: Path, pictures: Path, tmp_path: Path):
    forms = {"run": run, "ours": import_weights(run, tmp_path / "ours"), "timm": export(run, tmp_path / "timm")}
    arrays = {name: read_arrays(features(pictures, form, tmp_path / f"{name}.zarr")) for name, form in forms.items()}
    for name in ("ours", "timm"):
        assert np.array_equal(arrays[name]["pooled"], arrays["run"]["pooled"])
        assert np.array_equal(arrays[name]["patches"], arrays["run"]["patches"])


def test_patches_can_be_left_out_and_labels_stand_only_where_there_are_any(run: Path, tmp_path: Path):
    Image.new("RGB", (50, 80), "red").save(tmp_path / "red.png")
    arrays = read_arrays(features(tmp_path, run, tmp_path / "out" / "a.zarr", patches=False))
    assert set(arrays) == {"keys", "pooled"}
    assert arrays["pooled"].shape == (1, 32)


def test_a_damaged_chunk_is_an_error_and_a_lost_one_is_no_feature(run: Path, pictures: Path, tmp_path: Path):
    path = features(pictures, run, tmp_path / "a.zarr")
    chunk = path / "pooled" / "c" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[10] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        read_arrays(path)
    chunk.unlink()
    assert np.isnan(read_arrays(path)["pooled"]).all()


def test_the_summary_names_every_array(run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    features(pictures, run, tmp_path / "a.zarr")
    said = capsys.readouterr().out
    for words in ("keys", "labels", "pooled", "5 x 32, float32", "5 x 8 x 8 x 32, float32", "a.zarr"):
        assert words in said


def test_what_lies_at_out_is_left_alone(run: Path, pictures: Path, tmp_path: Path):
    out = features(pictures, run, tmp_path / "a.zarr", patches=False)
    before = (out / "zarr.json").read_bytes()
    with pytest.raises(UsageError, match=r"a\.zarr already exists"):
        features(pictures, run, out)
    assert (out / "zarr.json").read_bytes() == before


def test_an_image_that_cannot_be_read_leaves_nothing(chain, run: Path, tmp_path: Path):
    images = tmp_path / "images"
    for record in read_records(chain.images)[:40]:
        target = images / f"{record.key}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        data = record.path.read_bytes()[record.offset : record.offset + record.length]
        target.write_bytes(data)
    target.write_bytes(data[:100])
    with pytest.raises(DataError, match="cannot be decoded"):
        features(images, run, tmp_path / "out" / "a.zarr", batch_size=8)
    assert not (tmp_path / "out").exists()
