"""Fine-tuned segmentation from the command line: what it writes, how it resumes, and what it refuses."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mapet.quickstart.drawings import write_drawings
from mapet.train_stage.weights.read import load_weights
from PIL import Image
from safetensors.torch import load_file

from ..warm import warm_command, warm_torchrun
from .runs import checkpoints, kill_at_first_checkpoint, left_at_step, lines, same

SETTINGS = (
    "model.channels=16",
    "model.image_size=32",
    "train.batch_size=4",
    "train.epochs=2",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.keep_last=100",
    "train.ema=0.9",
    "optimizer.warmup_epochs=0.5",
)
SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training images in train/, four validation images in val/."""
    root = tmp_path_factory.mktemp("drawings")
    write_drawings(root / "train", 12, seed=1, masks=True)
    write_drawings(root / "val", 4, seed=2, masks=True)
    return root


def words(lab, drawings: Path, out: Path) -> list[object]:
    images = ["--images", drawings / "train", "--val", drawings / "val", "--out", out]
    return ["train", "segment", lab.run, "--head", "upernet", *images, *SET]


@pytest.fixture(scope="module")
def tuned(mapet, lab, drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 6 steps, with checkpoints at 2, 4 and 6. Never write into it."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    mapet(*words(lab, drawings, out)).ok()
    return out


@pytest.fixture
def segment(mapet, lab, drawings: Path, tmp_path: Path) -> Callable[..., object]:
    """segment(*options)"""
    return lambda *options: mapet(*words(lab, drawings, tmp_path / "run"), *options)


def test_a_run_and_its_figures(segment, lab, tmp_path: Path):
    """A run is trained and measured: tables, a page, and figures during the run with validation.every."""
    outcome = segment("--html", tmp_path / "page.html", "--set", "validation.every=3").ok()
    assert "UPerNet" in outcome.stdout
    assert "IoU by class" in outcome.stdout
    assert (tmp_path / "page.html").read_text().count('class="segmentation"') == 4
    assert [line["step"] for line in lines(tmp_path / "run" / "probe.jsonl")] == [3, 6]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["init"]["sha256"] == load_weights(lab.run).sha256()
    shown = f"{lines(tmp_path / 'run' / 'probe.jsonl')[-1]['mean_iou']:.1%}"
    assert shown in outcome.stdout  # the page and the run measure the same weights in the same way


def test_a_finished_run_is_only_measured(segment, tuned: Path, tmp_path: Path):
    """The command of a finished run measures it again and writes nothing into its checkpoints."""
    shutil.copytree(tuned, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*.safetensors")}
    outcomes = [json.loads(segment("--json").ok().stdout) for _ in range(2)]
    assert outcomes[0] == outcomes[1]
    (row,) = outcomes[0]["rows"]
    assert (row["features"], row["classifier"]) == ("pre-trained", "UPerNet")
    assert row["protocol"]["settings"]["train"]["epochs"] == 2
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*.safetensors")} == before


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_resumes_in_mid_epoch(segment, tuned: Path, tmp_path: Path, step: int):
    """A run resumes from a checkpoint in the middle of an epoch and ends with the same bytes."""
    left_at_step(tuned, tmp_path / "run", step)
    assert f"step {step} of 6" in segment().ok().text
    assert same(tuned, tmp_path / "run")


def test_a_killed_run_resumes(start, segment, lab, drawings: Path, tuned: Path, tmp_path: Path):
    """A run that was killed resumes and ends with the same bytes."""
    out = tmp_path / "run"
    process = start(*words(lab, drawings, out))
    kill_at_first_checkpoint(process, out)
    segment().ok()
    assert same(tuned, out)


def test_from_scratch(segment, tmp_path: Path):
    """--from-scratch starts from fresh weights of the same shape, and the table says so."""
    assert "from scratch" in segment("--from-scratch").ok().stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["init"] is None


def test_a_frozen_encoder(segment, lab, tmp_path: Path):
    """With all blocks frozen the encoder stays as it was, and UPerNet is trained."""
    segment("--set", "model.freeze=1").ok()
    before = load_weights(lab.run).resized(32).tensors
    first, last = (
        load_file(path / "model.safetensors") for path in (checkpoints(tmp_path / "run")[at] for at in (0, -1))
    )
    encoder = [name for name in last if name.startswith(("blocks.", "patch_embed.", "cls_token", "pos_embed"))]
    assert len(encoder) > 10
    assert all(before[name].equal(last[name]) for name in encoder)
    assert not any(first[name].equal(last[name]) for name in last if name not in encoder)


@pytest.mark.parametrize("recipe", ["segment-vit-base-16", "segment-small-data"])
def test_shipped_recipes(mapet, lab, drawings: Path, tmp_path: Path, recipe: str):
    """A shipped recipe fits any weights."""
    images = ["--images", drawings / "train", "--val", drawings / "val", "--out", tmp_path / "run"]
    smaller = ["train.batch_size=6", "train.epochs=1", "optimizer.warmup_epochs=0", "model.image_size=32"]
    settings = [word for setting in [*smaller, "model.channels=16"] for word in ("--set", setting)]
    mapet("train", "segment", lab.run, "--head", "upernet", *images, "--recipe", recipe, *settings).ok()


def test_other_masks_do_not_resume(segment, tuned: Path, tmp_path: Path):
    """A run does not resume with other masks of the same images, such as another ignored value."""
    shutil.copytree(tuned, tmp_path / "run")
    segment("--ignore", 3).refused(1, "other masks, ignored values or class names", "--out")


def test_other_settings_do_not_resume(segment, tuned: Path, tmp_path: Path):
    """A run does not resume with another augmentation."""
    shutil.copytree(tuned, tmp_path / "run")
    segment("--set", "augment.flip=0").refused(2, "augment.flip was 0.5 and is 0.0")


def test_a_pretraining_is_not_overwritten(segment, lab, tmp_path: Path):
    """The folder of a pre-training is refused as --out."""
    shutil.copytree(lab.run, tmp_path / "run")
    segment().refused(2, "another task", "choose another --out")


def test_a_segmentation_is_no_encoder(mapet, tuned: Path, drawings: Path):
    """A segmentation run is refused as weights of another command, which is told what to give."""
    outcome = mapet("train", "features", drawings / "val", "--weights", tuned, "--out", "unused")
    outcome.refused(1, "is of a segmentation", "give the weights that the run started from")


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("model.channels=24", "model.channels 24 must be a multiple of 16"),
        ("model.image_size=36", "multiple of"),
        ("model.image_size=8", "less than two patches of 8"),
        ("model.freeze=5", "more than the 1 blocks"),
        ("model.dropout=1", "model.dropout"),
        ("augment.scale=[2,0.5]", "augment.scale"),
        ("augment.flip=nan", "augment.flip"),
        ("data.cache=here", "data.cache"),
        ("validation.every=0", "validation.every"),
        ("optimizer.warmup_epochs=2", "--recipe segment-small-data"),
        ("augment.mixup=1", "Known:"),
    ],
)
def test_settings_that_do_not_fit(segment, tmp_path: Path, setting: str, part: str):
    """A setting that does not fit is refused by name."""
    segment("--set", setting).refused(2, part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "part"),
    [
        (("--iterations", 5), "--iterations is of frozen encoders"),
        (("--random-init",), "--random-init is of frozen encoders"),
        (("--seed", 1), "--seed is of frozen encoders"),
    ],
)
def test_options_of_frozen_encoders(segment, option: tuple, part: str):
    """Options of frozen encoders are refused beside --head upernet."""
    segment(*option).refused(2, part, "--set")


@pytest.mark.parametrize("option", [("--out", "run"), ("--from-scratch",), ("--set", "train.epochs=1")])
def test_options_of_upernet(mapet, lab, drawings: Path, option: tuple):
    """Options of --head upernet are refused without it."""
    images = ["--images", drawings / "train", "--val", drawings / "val"]
    mapet("train", "segment", lab.run, *images, *option).refused(2, f"{option[0]} is of --head upernet")


def test_no_folder_for_the_run(mapet, lab, drawings: Path):
    """--head upernet without --out is refused."""
    images = ["--images", drawings / "train", "--val", drawings / "val"]
    mapet("train", "segment", lab.run, *images, "--head", "upernet").refused(2, "--out")


def test_validation_images_of_another_size(mapet, lab, drawings: Path, write_folder, picture, tmp_path: Path):
    """Validation images of any size are measured at the size of their masks."""
    for folder, mode in (("images", "RGB"), ("annotations", "L")):
        (tmp_path / "val" / folder).mkdir(parents=True)
        values = np.random.default_rng(0).integers(0, 3, (50, 90, 3)[: 3 if mode == "RGB" else 2], np.uint8)
        Image.fromarray(values * (80 if mode == "RGB" else 1)).save(tmp_path / "val" / folder / "a.png")
    options = words(lab, drawings, tmp_path / "run")
    options[options.index("--val") + 1] = tmp_path / "val"
    (row,) = json.loads(mapet(*options, "--json").ok().stdout)["rows"]
    assert row["protocol"]["val_images"] == 1


@pytest.mark.campaign
def test_two_processes_of_one_torchrun(lab, drawings: Path, tuned: Path, tmp_path: Path):
    """Under torchrun two processes work on one run, with the losses of one process, and the first one measures it."""
    launch = [*warm_torchrun(), "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*warm_command(), *words(lab, drawings, tmp_path / "run")]
    ran = subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("IoU by class") == 1
    losses = [[line["loss"] for line in lines(run / "metrics.jsonl")] for run in (tuned, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
