"""Fine-tuning from the command line: what it writes, what opens it afterwards, and what it refuses."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zarr
from mapet.quickstart.drawings import write_drawings
from mapet.shared.sources.sources import read_records
from mapet.train_stage.weights.read import load_weights
from timm import create_model

from ..warm import warm_command, warm_torchrun
from .runs import checkpoints, kill_at_first_checkpoint, left_at_step, lines, same

SETTINGS = (
    "train.batch_size=16",
    "train.epochs=2",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.keep_last=100",
    "train.ema=0.9",
    "optimizer.warmup_epochs=0.5",
    "augment.rand_augment=rand-m5-mstd0.5-inc1",
)
SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val") / "val"
    write_drawings(folder, 24, seed=12, per_tar=24)
    return folder


@pytest.fixture(scope="module")
def tuned(mapet, lab, val: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fine-tuning of 6 steps, with checkpoints at 2, 4 and 6. Never write into it."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    mapet("train", "finetune", lab.run, "--images", lab.images, "--val", val, "--out", out, *SET).ok()
    return out


@pytest.fixture
def finetune(mapet, lab, val: Path, tmp_path: Path) -> Callable[..., object]:
    """finetune(*options, weights=..., images=..., val=..., out=...)"""

    def call(*options: object, weights=lab.run, images=lab.images, val=val, out=tmp_path / "run"):
        return mapet("train", "finetune", weights, "--images", images, "--val", val, "--out", out, *SET, *options)

    return call


def test_a_finished_run_has_class_names_and_accuracies(tuned: Path):
    """Fine-tuning writes a classifier with class names, and its accuracies on the validation images."""
    weights = load_weights(tuned)
    assert weights.kind == "classifier"
    assert weights.class_names == tuple(map(str, range(16)))
    assert weights.input.crop_pct == 0.9
    measured = lines(tuned / "probe.jsonl")
    assert [line["step"] for line in measured] == [3, 6]
    assert all(0 <= line["top1"] <= line["top5"] <= 1 and line["loss"] > 0 for line in measured)
    assert json.loads((tuned / "run.json").read_text())["class_names"] == [str(number) for number in range(16)]


def test_the_pretrained_encoder_is_where_it_starts(tuned: Path, lab):
    """Training starts from the weights that are given, and run.json names them."""
    start = json.loads((tuned / "run.json").read_text())["init"]
    assert start["sha256"] == load_weights(lab.run).sha256()


def test_class_names_reach_timms_config(mapet, tuned: Path, tmp_path: Path):
    """An export of a fine-tuned model states its class names as timm's label_names, and timm opens it."""
    mapet("train", "export", tuned, "--out", tmp_path / "timm").ok()
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["label_names"] == [str(number) for number in range(16)]
    assert config["num_classes"] == 16
    assert config["pretrained_cfg"]["crop_pct"] == 0.9
    assert create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).num_classes == 16
    exported = load_weights(tmp_path / "timm")
    assert (exported.kind, exported.class_names) == ("classifier", load_weights(tuned).class_names)
    assert exported.input.crop_pct == 0.9


def test_class_names_survive_an_import(mapet, tuned: Path, tmp_path: Path):
    """An import of a fine-tuned model keeps its class names."""
    mapet("train", "import", tuned, "--out", tmp_path / "imported").ok()
    assert load_weights(tmp_path / "imported").class_names == load_weights(tuned).class_names


def test_a_fine_tuned_run_is_probed(mapet, lab, val: Path, tuned: Path):
    """A fine-tuned run opens as weights for train probe."""
    assert "linear probe" in mapet("train", "probe", tuned, "--images", lab.images, "--val", val).ok().text


def test_features_of_a_fine_tuned_run(mapet, val: Path, tuned: Path, tmp_path: Path):
    """train features writes the input of the head of a fine-tuned run."""
    mapet("train", "features", val, "--weights", tuned, "--out", tmp_path / "features").ok()
    group = zarr.open_group(tmp_path / "features", mode="r")
    assert group.attrs["weights"]["kind"] == "classifier"
    assert (group["pooled"].shape, group["patches"].shape) == ((24, 32), (24, 8, 8, 32))
    assert group["labels"][:].tolist() == [int(record.label) for record in read_records(val)]


def test_a_fine_tuned_run_is_tuned_again(finetune, tuned: Path):
    """A fine-tuned model is fine-tuned further, and its head is kept where the classes are the same."""
    assert "newly initialised" not in finetune(weights=tuned).ok().text


def test_names_of_class_folders(finetune, write_folder, tmp_path: Path, picture):
    """Class folders give the classifier their names; the validation images may lack some of them."""
    train = write_folder(tmp_path / "train", {f"{c}/{i}.png": picture() for c in ("cat", "ant") for i in range(16)})
    val = write_folder(tmp_path / "val", {"cat/1.png": picture()})
    finetune(images=train, val=val).ok()
    assert load_weights(tmp_path / "run").class_names == ("ant", "cat")


def test_another_image_size(finetune, tmp_path: Path):
    """Another image size resamples the positions."""
    finetune("--set", "model.image_size=96").ok()
    assert load_weights(tmp_path / "run").shape.image_size == 96


def test_from_scratch(finetune, tmp_path: Path):
    """--from-scratch starts from fresh weights of the same shape."""
    finetune("--from-scratch").ok()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["init"] is None


def test_frozen_blocks_stay_as_they_are(finetune, lab, tmp_path: Path):
    """--freeze leaves the first blocks as they were, and trains the head."""
    finetune("--freeze", 1).ok()
    before, after = load_weights(lab.run).tensors, load_weights(tmp_path / "run").tensors
    frozen = [name for name in after if name.startswith(("blocks.0.", "patch_embed.", "cls_token", "pos_embed"))]
    assert len(frozen) > 10
    assert all(before[name].equal(after[name]) for name in frozen)
    assert after["head.bias"].abs().max() > 0


def test_a_dry_run_writes_nothing(finetune, tmp_path: Path):
    """--dry-run estimates the run and writes nothing."""
    finetune("--dry-run").ok()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", ["finetune-vit-base-16", "finetune-small-data"])
def test_shipped_recipes(mapet, lab, val: Path, recipe: str):
    """A shipped recipe fits any weights."""
    options = ["--recipe", recipe, "--set", "train.batch_size=16", "--out", "unused", "--dry-run"]
    mapet("train", "finetune", lab.run, "--images", lab.images, "--val", val, *options).ok()


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_resumes_in_mid_epoch(finetune, tuned: Path, tmp_path: Path, step: int):
    """A run resumes from a checkpoint in the middle of an epoch and ends with the same bytes."""
    left_at_step(tuned, tmp_path / "run", step)
    assert f"step {step} of 6" in finetune().ok().text
    assert same(tuned, tmp_path / "run")


def test_a_killed_run_resumes(start, finetune, lab, val: Path, tuned: Path, tmp_path: Path):
    """A run that was killed resumes and ends with the same bytes."""
    out = tmp_path / "run"
    process = start("train", "finetune", lab.run, "--images", lab.images, "--val", val, "--out", out, *SET)
    kill_at_first_checkpoint(process, out)
    finetune().ok()
    assert same(tuned, out)


def test_images_without_labels(finetune, write_folder, tmp_path: Path, picture):
    """Training images without labels are refused."""
    images = write_folder(tmp_path / "images", {f"{number}.png": picture() for number in range(4)})
    finetune(images=images).refused(1, "have no label", str(images))
    assert not (tmp_path / "run").exists()


def test_validation_images_of_unknown_classes(finetune, write_folder, tmp_path: Path, picture):
    """Validation images of a class that the training images do not have are refused."""
    train = write_folder(tmp_path / "train", {f"{c}/{i}.png": picture() for c in ("cat", "ant") for i in range(16)})
    val = write_folder(tmp_path / "val", {"cat/1.png": picture(), "dog/2.png": picture()})
    finetune(images=train, val=val).refused(1, "not among the training images (dog)")
    assert not (tmp_path / "run").exists()


def test_other_labels_do_not_resume(finetune, tuned: Path, lab, tmp_path: Path):
    """A run does not resume with other labels of the same images."""
    shutil.copytree(tuned, tmp_path / "run")
    names = tmp_path / "labels.txt"
    names.write_text("".join(f"{(number * 5) % 16}\n" for number in range(48)))
    finetune("--labels", names).refused(1, "other classes or labels", "--out")


def test_other_settings_do_not_resume(finetune, tuned: Path, tmp_path: Path):
    """A run does not resume with another augmentation."""
    shutil.copytree(tuned, tmp_path / "run")
    finetune("--set", "augment.mixup=0.1").refused(2, "augment.mixup was 0.8 and is 0.1")


def test_other_weights_do_not_resume(finetune, tuned: Path, tmp_path: Path):
    """A run does not resume from other weights than it was started from."""
    shutil.copytree(tuned, tmp_path / "run")
    finetune(weights=tuned).refused(2, "belongs to a run that started from")


def test_a_pretraining_is_not_overwritten(finetune, lab, tmp_path: Path):
    """The folder of a pre-training is refused as --out."""
    shutil.copytree(lab.run, tmp_path / "run")
    finetune().refused(2, "another task", "choose another --out")


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("augment.rand_augment=strong", "is not a RandAugment policy of timm"),
        ("augment.mixup=nan", "augment.mixup"),
        ("augment.crop_scale=[0.5]", "must have two numbers"),
        ("model.image_size=70", "multiple of"),
        ("model.freeze=5", "more than the 1 blocks"),
        ("model.classes=3", "fewer than the 16 classes"),
        ("optimizer.layer_decay=0", "optimizer.layer_decay"),
        ("data.color_jitter=0.4", "augment.rand_augment"),
        ("validation.every=0", "validation.every"),
        ("train.batch_size=15", "multiples of 2"),
        ("objective.name=mim", "Known:"),
    ],
)
def test_settings_that_do_not_fit(finetune, tmp_path: Path, setting: str, part: str):
    """A setting that does not fit is refused by name."""
    finetune("--set", setting).refused(2, part)
    assert not (tmp_path / "run").exists()


def test_a_models_name_needs_from_scratch(finetune):
    """The name of a model without --from-scratch is refused."""
    finetune(weights="vit-tiny").refused(2, "--from-scratch")


def test_a_short_run_without_a_recipe(mapet, lab, val: Path, tmp_path: Path):
    """The published warm-up is longer than a short run: the message says what to do."""
    options = ["--set", "train.batch_size=16", "--set", "train.epochs=5", "--out", tmp_path / "run"]
    outcome = mapet("train", "finetune", lab.run, "--images", lab.images, "--val", val, *options)
    outcome.refused(
        2, "20.0 is not shorter than 5 epochs", "--set optimizer.warmup_epochs=0.5", "--recipe finetune-small-data"
    )
    assert not (tmp_path / "run").exists()


def test_an_image_that_is_damaged_in_mid_epoch(finetune, write_folder, picture, tmp_path: Path):
    """A damaged image stops the run by its name; with the image restored the same command goes on, bit by bit."""
    pictures = {f"{name}/{name}{at}.jpg": picture(at) for name in ("ant", "cat") for at in range(24)}
    images = write_folder(tmp_path / "images", pictures)
    val = write_folder(tmp_path / "val", {"cat/1.jpg": picture(1)})
    options = ["--set", "train.log_keys=true"]
    finetune(*options, images=images, val=val, out=tmp_path / "whole").ok()
    last = next(line["keys"][0] for line in lines(next((tmp_path / "whole" / "keys").iterdir())) if line["step"] == 3)
    damaged = images / f"{last}.jpg"
    damaged.write_bytes(pictures[f"{last}.jpg"][:200])
    finetune(*options, images=images, val=val).refused(1, str(damaged), f"image {last!r}")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-0000002"]
    damaged.write_bytes(pictures[f"{last}.jpg"])
    assert "step 2 of 6" in finetune(*options, images=images, val=val).ok().text
    assert same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.campaign
def test_two_processes_of_one_torchrun(lab, val: Path, tuned: Path, tmp_path: Path):
    """Under torchrun two processes work on one run, with the losses and accuracies of one process."""
    launch = [*warm_torchrun(), "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*warm_command(), "train", "finetune", lab.run]
    options = ["--images", lab.images, "--val", val, "--out", tmp_path / "run", *SET]
    ran = subprocess.run([*launch, *map(str, [*command, *options])], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    losses = [[line["loss"] for line in lines(run / "metrics.jsonl")] for run in (tuned, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    measured = [lines(run / "probe.jsonl")[-1] for run in (tuned, tmp_path / "run")]
    assert measured[1]["loss"] == pytest.approx(measured[0]["loss"], rel=1e-4)
