"""Starting a pre-training from weights (--init), and going on with a finished one (--extend)."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from mapet.shared.storage.files import sha256_file
from mapet.train_stage.weights.read import load_weights
from safetensors.torch import load_file

ORACLE = Path(__file__).parents[1] / "train_stage" / "oracle"
STILL = ("optimizer.lr=1e-30", "optimizer.min_lr=0", "optimizer.warmup_lr=0", "train.epochs=1")
"""Nothing is learnt, so that the last weights are those of the start."""


def options(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture
def pretrain(mapet, lab, tmp_path: Path):
    """pretrain(*options, out=...): the lab's command."""

    def call(*more: object, out: Path = tmp_path / "run", tokens: Path = lab.tokens):
        return mapet(
            "train", "pretrain", "--images", lab.images, "--tokens", tokens, "--out", out, *lab.settings, *more
        )

    return call


@pytest.fixture
def finished(lab, tmp_path: Path) -> Path:
    """A copy of the lab's finished run of 2 epochs."""
    return Path(shutil.copytree(lab.run, tmp_path / "run"))


def started(out: Path) -> tuple[dict, dict]:
    """What run.json says of the start, and the last weights."""
    (checkpoint,) = sorted((out / "checkpoints").iterdir())[-1:]
    return json.loads((out / "run.json").read_text())["init"], load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("kind", ["run", "checkpoint", "import"])
def test_init_from_own_weights(mapet, lab, pretrain, tmp_path: Path, kind: str):
    """A run, a checkpoint or an import is where a new run with a fresh schedule starts, decoder included."""
    weights = {"run": lab.run, "checkpoint": max((lab.run / "checkpoints").iterdir()), "import": tmp_path / "import"}
    if kind == "import":
        mapet("train", "import", lab.run, "--out", weights[kind]).ok()
    assert "newly initialised" not in pretrain("--init", weights[kind], *options(*STILL)).ok().text
    start, tensors = started(tmp_path / "run")
    before = load_weights(lab.run)
    assert start["sha256"] == sha256_file(Path(start["file"]))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.tensors.items())
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates[0] == 1e-30


def test_init_from_an_export_has_a_fresh_decoder(mapet, lab, pretrain, tmp_path: Path):
    """An export, which timm opens, lacks the decoder; the encoder is taken and the decoder starts fresh."""
    mapet("train", "export", lab.run, "--out", tmp_path / "timm").ok()
    said = pretrain("--init", tmp_path / "timm", *options(*STILL)).ok().text
    assert "newly initialised: mask_positional_token, decoder.weight, decoder.bias" in said
    start, tensors = started(tmp_path / "run")
    file = tmp_path / "timm" / "model.safetensors"
    assert start == {"file": str(file), "sha256": sha256_file(file)}
    assert torch.equal(tensors["blocks.0.mlp.fc1.weight"], load_weights(lab.run).tensors["blocks.0.mlp.fc1.weight"])


def published() -> list[str]:
    shape = load_weights(ORACLE / "pretrain.pth.tar").shape
    named = {"dim": shape.dim, "depth": shape.depth, "heads": shape.heads, "patch_size": shape.patch_size}
    return options(*(f"model.{name}={value}" for name, value in named.items()))


def test_init_from_a_published_file_of_another_grid_and_k(lab, pretrain, tmp_path: Path):
    """A published .pth.tar of another grid and K: positions are resampled and the decoder starts fresh."""
    weights = load_weights(ORACLE / "pretrain.pth.tar")
    size = 8 * weights.shape.patch_size
    said = pretrain(
        "--init", ORACLE / "pretrain.pth.tar", *published(), *options(*STILL, f"model.image_size={size}")
    ).ok()
    assert "newly initialised: decoder.weight, decoder.bias." in said.text
    start, tensors = started(tmp_path / "run")
    assert start["sha256"] == sha256_file(ORACLE / "pretrain.pth.tar")
    expected = weights.resized(size).tensors
    assert all(torch.equal(tensors[name], expected[name]) for name in expected if not name.startswith("decoder."))
    assert tensors["pos_embed"].shape[1] == 65


def test_init_from_a_fine_tuned_model(lab, pretrain, tmp_path: Path):
    """A fine-tuned published file: its head is left out, and what pre-training adds starts fresh."""
    shape = load_weights(ORACLE / "finetune.pth.tar").shape
    sizes = options(f"model.image_size={8 * shape.patch_size}")
    said = pretrain("--init", ORACLE / "finetune.pth.tar", *published(), *sizes, *options(*STILL)).ok().text
    assert "decoder.weight" in said
    assert not any(name.startswith(("head", "fc_norm")) for name in started(tmp_path / "run")[1])


def test_init_from_another_model_of_timm_is_refused(pretrain, tmp_path: Path):
    """A folder of another model of timm is no start."""
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=3), tmp_path / "timm", safe_serialization=True)
    pretrain("--init", tmp_path / "timm").refused(1, "config.json", "is not a description of a ViT that mapet exported")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_init_from_a_state_dict_of_timm_is_refused(pretrain, tmp_path: Path):
    """A state dict of timm in a .pth file is no published checkpoint."""
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    pretrain("--init", tmp_path / "vit.pth").refused(1, "vit.pth", "is not a published checkpoint")


def test_init_of_another_shape_is_refused(lab, pretrain):
    """Weights of another width are refused, and the sentence names both."""
    pretrain("--init", ORACLE / "pretrain.pth.tar").refused(2, "--init", "has dim", "the run's model 32")


def test_extending_a_finished_run(pretrain, finished: Path):
    """--extend goes on with a finished run; the same command again does nothing more."""
    said = pretrain("--extend", 3, *options("extension.lr=1e-4", "extension.min_lr=1e-6")).ok().text
    assert "to 3 epochs (step 6 to 9): learning rate from 1e-05 to 0.0001 in 0 steps, then a cosine to 1e-06" in said
    assert "extended" in said
    assert json.loads((finished / "run.json").read_text())["extensions"][0]["epochs"] == 3
    again = pretrain("--extend", 3, *options("extension.lr=1e-4", "extension.min_lr=1e-6")).ok().text
    assert "complete already" in again
    assert "complete already" in pretrain().ok().text


def test_extending_without_a_run_is_refused(pretrain, tmp_path: Path):
    """--extend on a new folder begins nothing."""
    pretrain("--extend", 3).refused(2, "--extend 3", "holds none", "leave it out to begin one")
    assert not (tmp_path / "run" / "run.json").exists()


def test_extending_an_unfinished_run_is_refused(pretrain, tmp_path: Path):
    """A run that is not finished is resumed before it is extended."""
    pretrain("--set", "train.checkpoint_every=2").ok()
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))
    pretrain("--extend", 3).refused(2, "4 of its 6 steps", "without --extend first")


def test_extending_to_fewer_epochs_is_refused(pretrain, finished: Path):
    """--extend counts the epochs that the run has."""
    pretrain("--extend", 2).refused(2, "has 2 epochs already", "give more than 2")


def test_extending_by_none_is_refused(pretrain):
    """--extend takes a number from 1 on."""
    outcome = pretrain("--extend", 0)
    assert outcome.exit_code == 2
    assert "--extend" in outcome.stderr


def test_extending_in_a_dry_run_is_refused(pretrain, finished: Path):
    """--dry-run estimates new runs only."""
    pretrain("--extend", 3, "--dry-run").refused(2, "--dry-run", "--extend 3", "leave one of the two out")


def test_extending_with_another_schedule_is_refused(pretrain, finished: Path):
    """An extension that was begun is not gone on with under another schedule."""
    pretrain("--extend", 3).ok()
    pretrain("--extend", 3, "--set", "extension.lr=1e-4").refused(
        2, "was extended to 3 epochs with another schedule", "extension.lr was 0.0015 and is 0.0001"
    )


def test_extending_with_a_warm_up_as_long_as_the_extension_is_refused(pretrain, finished: Path):
    """The warm-up of an extension is shorter than the extension."""
    pretrain("--extend", 3, "--set", "extension.warmup_epochs=1").refused(
        2, "extension.warmup_epochs 1 is not shorter than the 1 epochs that are added"
    )
