"""Weights are the same after import, export and back; files that do not hold any are refused in one sentence."""

import argparse
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import timm
import torch
from mapet.shared.errors import DataError, UsageError
from mapet.train_stage.export import export
from mapet.train_stage.import_weights import import_weights
from mapet.train_stage.model.mapet import MaPeT
from mapet.train_stage.model.shape import SIZES, Shape
from mapet.train_stage.objectives.layouts import make_layout
from mapet.train_stage.probe import probe
from mapet.train_stage.weights import write as writing
from mapet.train_stage.weights.checkpoint import newest_checkpoint, save_checkpoint
from mapet.train_stage.weights.published import load_published
from mapet.train_stage.weights.read import load_weights
from safetensors.torch import load_file
from torch import Tensor

ORACLE = Path(__file__).parents[1] / "oracle"
PRETRAIN, FINETUNE = ORACLE / "pretrain.pth.tar", ORACLE / "finetune.pth.tar"
FILES = ("model.safetensors", "config.json")


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def largest_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def opened(folder: Path, **options) -> timm.models.VisionTransformer:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def noise(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def checkpoint_of(shape: Shape, folder: Path) -> Path:
    """A checkpoint whose every value, LayerScale included, is far from where training and timm start."""
    torch.manual_seed(0)
    model = MaPeT(shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model_input = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    metadata = {"model": shape.to_json(), "input": model_input, "seed": 0}
    return save_checkpoint(folder, 1, {"model.safetensors": model.state_dict()}, metadata)


def published(
    folder: Path, source: Path = PRETRAIN, drop: str = "", put: dict[str, Tensor] | None = None, **changes
) -> Path:
    """A copy of an oracle checkpoint without the tensor `drop`, with `put` and with other top-level entries."""
    content = torch.load(source, weights_only=False)
    state = {name: tensor for name, tensor in content["state_dict"].items() if name != drop}
    torch.save({**content, "state_dict": {**state, **(put or {})}, **changes}, folder / "a.pth.tar")
    return folder / "a.pth.tar"


def test_a_run_opens_in_timm_and_gives_the_same_features(run: Path, tmp_path: Path):
    model = load_weights(run).mapet().eval()
    expected = model.norm(model.encode(noise(64)))
    timm_model = opened(export(run, tmp_path / "timm"))
    assert largest_error(timm_model.forward_features(noise(64)), expected) < 1e-5
    assert largest_error(timm_model(noise(64)), model.features(noise(64))) < 1e-5
    known = timm.data.resolve_model_data_config(timm_model)
    assert (list(known["input_size"]), known["interpolation"], known["crop_pct"]) == ([3, 64, 64], "bilinear", 1.0)
    assert (list(known["mean"]), list(known["std"])) == ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    assert (timm_model.num_classes, timm_model.pretrained_cfg["num_classes"]) == (0, 0)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(dim=24, depth=3, heads=2, patch_size=4, image_size=12, k=5, mlp_ratio=2.5),
        Shape(*SIZES["small"], patch_size=16, image_size=224, k=8192),
    ],
    ids=["odd", "small"],
)
def test_any_shape_opens_in_timm_with_every_tensor_in_its_place(shape: Shape, tmp_path: Path):
    checkpoint = checkpoint_of(shape, tmp_path)
    model = load_weights(checkpoint).mapet().eval()
    timm_model = opened(export(checkpoint, tmp_path / "timm"))
    images = noise(shape.image_size, 1)
    with torch.no_grad():
        assert largest_error(timm_model.forward_features(images), model.norm(model.encode(images))) < 1e-5
        assert largest_error(timm_model(images), model.features(images)) < 1e-5
    assert torch.equal(timm_model.blocks[-1].ls2.gamma, model.blocks[-1].ls2.gamma)
    assert sum(p.numel() for p in timm_model.parameters()) == sum(
        p.numel() for name, p in model.named_parameters() if "decoder" not in name and "mask" not in name
    )


def test_an_export_takes_a_new_head_in_timm(run: Path, tmp_path: Path):
    folder = export(run, tmp_path / "timm")
    classifier = opened(folder, num_classes=7)
    assert classifier(noise(64)).shape == (2, 7)
    assert largest_error(classifier.forward_features(noise(64)), opened(folder).forward_features(noise(64))) == 0


def test_a_fine_tuned_checkpoint_classifies_in_timm_as_it_was_published(tmp_path: Path):
    expected = load_file(ORACLE / "finetune_expected.safetensors")
    folder = export(import_weights(FINETUNE, tmp_path / "imported"), tmp_path / "timm")
    timm_model = opened(folder)
    assert timm_model.num_classes == 10
    assert largest_error(timm_model(expected["images"]), expected["logits"]) < 1e-5
    assert largest_error(timm_model.forward_features(expected["images"]), expected["features"]) < 1e-5


def test_an_imported_pre_training_checkpoint_predicts_as_it_was_published(tmp_path: Path):
    expected = load_file(ORACLE / "pretrain_expected.safetensors")
    model = load_weights(import_weights(PRETRAIN, tmp_path / "imported")).mapet()
    order, visible = expected["order"], int(expected["least_number"]) - 1
    logits = model(expected["images"], order, make_layout("mapet", 16, visible))
    raster = order[:, visible:].argsort(1)[:, :, None].expand_as(logits)
    assert largest_error(logits.gather(1, raster), expected["logits"]) < 1e-5
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("source", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_there_and_back_is_exact(source: Path, tmp_path: Path):
    once = export(source, tmp_path / "once")
    again = export(import_weights(once, tmp_path / "imported"), tmp_path / "again")
    assert [(once / name).read_bytes() for name in FILES] == [(again / name).read_bytes() for name in FILES]
    before, after = load_weights(source), load_weights(again)
    left_behind = {"mask_positional_token", "decoder.weight", "decoder.bias"}
    assert set(before.tensors) - set(after.tensors) == left_behind & set(before.tensors)
    assert all(torch.equal(before.tensors[name], tensor) for name, tensor in after.tensors.items())
    assert (before.shape.heads, before.shape.mlp_ratio) == (after.shape.heads, after.shape.mlp_ratio)


def test_an_import_keeps_everything_and_says_what_it_is(run: Path, tmp_path: Path):
    before, after = load_weights(run), load_weights(import_weights(run, tmp_path / "imported"))
    assert set(before.tensors) == set(after.tensors)
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())
    assert (before.shape, before.input, before.seed) == (after.shape, after.input, after.seed)
    assert after.seed == 3
    metadata = json.loads((tmp_path / "imported" / "weights.json").read_text())
    assert (metadata["kind"], metadata["source"]["sha256"]) == ("pretraining", before.sha256())
    assert json.loads((import_weights(FINETUNE, tmp_path / "b") / "weights.json").read_text())["classes"] == 10


@pytest.mark.usefixtures("short_fits")
def test_a_probe_finds_the_same_in_a_run_its_import_and_its_export(chain, run: Path, tmp_path: Path):
    folders = [run, import_weights(run, tmp_path / "imported"), export(run, tmp_path / "timm")]
    first, *others = [probe(folder, chain.images, chain.images) for folder in folders]
    assert others == [first, first]


def test_positions_are_resampled_as_timm_does_on_loading(run: Path, tmp_path: Path):
    timm_model = opened(export(run, tmp_path / "as-it-was"), img_size=96)
    larger = opened(export(run, tmp_path / "larger", image_size=96))
    assert larger.patch_embed.grid_size == (12, 12)
    assert list(larger.pretrained_cfg["input_size"]) == [3, 96, 96]
    assert torch.equal(larger.pos_embed, timm_model.pos_embed)
    assert torch.equal(larger(noise(96)), timm_model(noise(96)))
    imported = load_weights(import_weights(run, tmp_path / "imported", image_size=96))
    assert torch.equal(imported.tensors["pos_embed"], timm_model.pos_embed)
    order = torch.arange(144).expand(2, -1)
    assert imported.mapet()(noise(96), order, make_layout("mapet", 144, 36)).shape == (2, 108, imported.shape.k)


def test_the_size_that_it_has_changes_nothing(run: Path, tmp_path: Path):
    plain, same = export(run, tmp_path / "plain"), export(run, tmp_path / "same", image_size=64)
    assert [(plain / name).read_bytes() for name in FILES] == [(same / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("write", [export, import_weights])
def test_a_size_that_the_patches_do_not_fill_is_refused(write, run: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="100 is not a multiple of the patch size 8"):
        write(run, tmp_path / "out", image_size=100)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [export, import_weights])
def test_what_lies_at_out_is_left_alone(write, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.safetensors").write_text("dear")
    (tmp_path / "file").write_text("dear too")
    (tmp_path / "empty").mkdir()
    for name in ("taken", "file"):
        with pytest.raises(UsageError, match=f"{name} already exists"):
            write(PRETRAIN, tmp_path / name)
    assert (tmp_path / "taken" / "model.safetensors").read_text() == "dear"
    assert load_weights(write(PRETRAIN, tmp_path / "empty")).shape.dim == 48


@pytest.mark.parametrize("write", [export, import_weights])
def test_a_write_that_fails_leaves_nothing_and_what_a_killed_one_left_is_no_hindrance(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(writing, "save_file", full)
        with pytest.raises(DataError, match=r"out could not be written \(No space left on device\); make room"):
            write(PRETRAIN, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    write(PRETRAIN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_published_checkpoint_gives_its_shape():
    shape = load_published(PRETRAIN).shape
    assert (shape.dim, shape.depth, shape.heads, shape.patch_size, shape.image_size, shape.k) == (48, 2, 3, 16, 64, 32)


@pytest.mark.parametrize("source", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_module_prefixes_are_read(source: Path, tmp_path: Path):
    state = torch.load(source, weights_only=False)["state_dict"]
    prefixed = published(tmp_path, source=source, state_dict={f"module.{name}": t for name, t in state.items()})
    tensors = load_weights(prefixed).tensors
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path):
    witness = tmp_path / "witness"
    bad = published(tmp_path, args=Malicious(witness))
    for read in (load_published, load_weights):
        with pytest.raises(DataError, match="nothing in it was run"):
            read(bad)
    assert not witness.exists()
    torch.load(bad, weights_only=False)
    assert witness.exists()  # it does run where pickles are executed


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 broken zip", b"\x80\x02}q\x00."])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "junk.pth.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"junk\.pth\.tar"):
        load_weights(tmp_path / "junk.pth.tar")


def test_a_truncated_checkpoint_is_refused_wherever_it_ends(tmp_path: Path):
    whole = PRETRAIN.read_bytes()
    for size in range(1, len(whole), len(whole) // 40):
        (tmp_path / "cut.pth.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut\.pth\.tar"):
            load_weights(tmp_path / "cut.pth.tar")


def test_a_checkpoint_with_changed_bytes_never_ends_in_a_traceback(tmp_path: Path):
    whole, random = bytearray(PRETRAIN.read_bytes()), Random(0)
    refused = 0
    for _ in range(60):
        changed = whole.copy()
        for _ in range(20):
            changed[random.randrange(3000)] = random.randrange(256)  # where the pickle lies
        (tmp_path / "changed.pth.tar").write_bytes(changed)
        try:
            load_weights(tmp_path / "changed.pth.tar")
        except DataError as error:
            refused += "changed.pth.tar" in str(error)
    assert refused > 50


def test_weights_without_a_decoder_are_not_taken_for_a_pre_training_checkpoint(tmp_path: Path):
    with pytest.raises(DataError, match=r"not a pre-training checkpoint: .* classifier"):
        load_published(FINETUNE)
    with pytest.raises(DataError, match=r"not a pre-training checkpoint: .* encoder"):
        load_weights(export(PRETRAIN, tmp_path / "timm")).mapet()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": "blocks.1.norm2.bias"}, "does not hold the weights"),
        ({"drop": "blocks.1.attn.kv.weight"}, "does not hold the weights"),
        ({"put": {"blocks.0.attn.rotary": torch.zeros(3)}}, "does not hold the weights"),
        ({"put": {"blocks.0.ls1.gamma": torch.zeros(49)}}, "does not hold the weights"),
        ({"put": {"pos_embed": torch.zeros(1, 1 + 15, 48)}}, "not form a square grid"),
        ({"drop": "pos_embed"}, "not a checkpoint with the weights of a MaPeT model"),
        ({"arch": "resnet50"}, "names architecture 'resnet50'"),
        ({"state_dict": {"epoch": 3}}, "not a published checkpoint"),
        ({"state_dict": [1, 2]}, "not a published checkpoint"),
        ({"state_dict": {}}, "not a checkpoint with the weights of a MaPeT model"),
    ],
)
@pytest.mark.parametrize("source", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_published_tensors_that_do_not_fit_are_refused(source: Path, changes: dict, words: str, tmp_path: Path):
    with pytest.raises(DataError, match=words) as caught:
        load_weights(published(tmp_path, source=source, **changes))
    assert "a.pth.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_argument_that_is_nothing_of_the_kind_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither a run"):
        load_weights(tmp_path)
    shutil.copy(ORACLE / "pretrain_expected.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="neither a run"):
        load_weights(tmp_path)


def test_a_folder_of_another_model_is_refused(tmp_path: Path):
    other = timm.create_model("test_vit", num_classes=3)
    folder = tmp_path / "other"
    timm.models.save_for_hf(other, folder, safe_serialization=True)
    with pytest.raises(DataError, match=r"config\.json is not a description of a ViT that mapet exported"):
        load_weights(folder)
    export(PRETRAIN, tmp_path / "timm")
    metadata = json.loads((tmp_path / "timm" / "config.json").read_text())
    for name, value in {"num_heads": 5, "patch_size": 7, "depth": 3, "embed_dim": "wide", "img_size": [64, 32]}.items():
        changed = {**metadata, "model_args": {**metadata["model_args"], name: value}}
        (tmp_path / "timm" / "config.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=r"not a description of a ViT|does not hold the weights"):
            load_weights(tmp_path / "timm")


def test_damaged_folders_are_refused(run: Path, tmp_path: Path):
    imported, exported = import_weights(run, tmp_path / "imported"), export(run, tmp_path / "timm")
    checkpoint = shutil.copytree(newest_checkpoint(run), tmp_path / "checkpoint")
    for folder, words in ((imported, "was changed"), (exported, "was changed"), (checkpoint, "was changed")):
        tensors = folder / "model.safetensors"
        whole = tensors.read_bytes()
        tensors.write_bytes(whole[:-5])
        with pytest.raises(DataError, match=words):
            load_weights(folder)
        tensors.write_bytes(whole)
        load_weights(folder)
    (checkpoint / "state.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match="is not a mapet-checkpoint"):
        load_weights(checkpoint)


def test_weights_that_do_not_fit_their_shape_cannot_be_made(run: Path):
    weights = load_weights(run)
    with pytest.raises(DataError, match="does not hold the weights"):
        replace(weights, tensors={name: t for name, t in weights.tensors.items() if name != "norm.bias"})
    with pytest.raises(DataError, match="does not hold the weights"):
        replace(weights, shape=replace(weights.shape, depth=3))


def test_half_precision_tensors_become_float32(tmp_path: Path):
    state = torch.load(PRETRAIN, weights_only=False)["state_dict"]
    half = published(tmp_path, state_dict={n: t.half() for n, t in state.items()}, args=argparse.Namespace())
    tensors = load_weights(half).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["cls_token"], state["cls_token"].half().float())
