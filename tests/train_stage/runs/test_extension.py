"""--extend: epochs with a schedule of their own after a finished run, resumable anywhere, and again."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mapet.shared.errors import UsageError
from mapet.train_stage.pretrain import pretrain, pretrain_dry_run
from mapet.train_stage.report import report
from mapet.train_stage.settings import resolve
from mapet.train_stage.training.extension import new_extension
from mapet.train_stage.weights.checkpoint import newest_checkpoint
from safetensors.torch import load_file

from ...warm import warm_command
from ..conftest import TINY
from ..training.test_parallel import finished, keys_of_steps, metrics, same_weights, torchrun

PER_EPOCH = 6
SETTINGS = [
    *TINY,
    "model.patch_size=8",
    "train.epochs=2",
    "train.batch_size=16",
    "train.log_every=1",
    "train.log_keys=true",
    "train.checkpoint_every=4",
    "train.keep_last=100",
    "train.ema=0.9",
    "optimizer.warmup_epochs=0.5",
    "optimizer.lr=1e-3",
    "optimizer.min_lr=1e-5",
    "objective.visible=48",
    "objective.visible_to=8",
]


def run(chain, out: Path, *overrides: str, extend: int | None = None, **options) -> Path:
    overrides = [*SETTINGS, *overrides]
    return pretrain(chain.images, chain.tokens, out, overrides=overrides, extend=extend, device="cpu", **options)


def record(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def cosine(peak: float, end: float, steps: int) -> list[float]:
    return [end + (peak - end) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


@pytest.fixture(scope="module")
def begun(chain, tmp_path_factory) -> Path:
    """A finished run of 2 epochs, 12 steps. Never write into it."""
    out = tmp_path_factory.mktemp("begun") / "run"
    run(chain, out)
    return out


@pytest.fixture(scope="module")
def longer(chain, begun: Path, tmp_path_factory) -> Path:
    """The same, extended to 4 epochs. Never write into it."""
    out = tmp_path_factory.mktemp("longer") / "run"
    shutil.copytree(begun, out)
    run(chain, out, "extension.lr=5e-4", "extension.warmup_epochs=0.5", extend=4)
    return out


def test_the_added_epochs_have_a_warm_up_and_a_cosine_of_their_own(begun: Path, longer: Path):
    rates = metrics(longer, "lr")
    assert rates[:12] == metrics(begun, "lr")
    warm_up = [1e-5 + (5e-4 - 1e-5) * step / 3 for step in range(3)]
    assert rates[12:] == pytest.approx([*warm_up, *cosine(5e-4, 1e-5, 9)], rel=1e-6)
    assert metrics(longer, "epoch")[-1] == 4
    assert newest_checkpoint(longer).name == "step-0000024"


def test_the_default_is_the_runs_own_peak_and_a_short_warm_up(chain, begun: Path, tmp_path: Path):
    shutil.copytree(begun, tmp_path / "run")
    run(chain, tmp_path / "run", extend=4)
    (extension,) = record(tmp_path / "run")["extensions"]
    assert (extension["lr"], extension["min_lr"], extension["warmup_lr"]) == (1e-3, 1e-5, 1e-5)
    assert extension["warmup_epochs"] == pytest.approx(0.2)
    rates = metrics(tmp_path / "run", "lr")[12:]
    assert rates == pytest.approx([1e-5, *cosine(1e-3, 1e-5, 11)], rel=1e-6)
    settings = resolve(overrides=SETTINGS)
    assert new_extension(300, PER_EPOCH, settings.extension, settings, ()).warmup_epochs == 1


def test_every_added_epoch_sees_every_image_once_in_an_order_of_its_own(begun: Path, longer: Path):
    seen = keys_of_steps(longer)
    assert len(seen) == 24
    epochs = [[seen[step] for step in range(first, first + PER_EPOCH)] for first in range(1, 24, PER_EPOCH)]
    assert all(len({key for step in epoch for key in step}) == 96 for epoch in epochs)
    assert all(epochs.count(epoch) == 1 for epoch in epochs)
    assert {step: seen[step] for step in range(1, 13)} == keys_of_steps(begun)


def test_the_optimizer_keeps_its_state(longer: Path):
    state = load_file(newest_checkpoint(longer) / "optimizer.safetensors")
    assert {float(tensor) for name, tensor in state.items() if name.endswith("/step")} == {24.0}


def test_the_first_steps_are_those_of_the_run_itself(begun: Path, longer: Path):
    assert metrics(longer)[:12] == metrics(begun)
    assert same_weights(longer / "checkpoints" / "step-0000012", newest_checkpoint(begun))


def test_run_json_and_checkpoints_name_the_extension_and_settings_stay_those_of_the_start(begun: Path, longer: Path):
    (extension,) = record(longer)["extensions"]
    assert {name: extension[name] for name in ("step", "epochs", "warmup_lr", "lr", "min_lr", "warmup_epochs")} == {
        "step": 12,
        "epochs": 4,
        "warmup_lr": 1e-5,
        "lr": 5e-4,
        "min_lr": 1e-5,
        "warmup_epochs": 0.5,
    }
    assert extension["time"].endswith("+00:00")
    assert extension["version"]
    assert json.loads((newest_checkpoint(longer) / "state.json").read_text())["extensions"] == [extension]
    assert "epochs: 2" in (longer / "settings.yaml").read_text()
    assert record(begun)["extensions"] == []


def test_the_page_of_the_run_states_the_extension(longer: Path, begun: Path, tmp_path: Path):
    page = report([longer, begun], html=tmp_path / "page.html").read_text()
    assert page.count("Extended to 4 epochs, from step 12: learning rate from 1e-05 to 0.0005 in 0.5 epochs") == 1


def shortened(out: Path, copy: Path, last: int) -> Path:
    """The run as a kill after the checkpoint of step `last` leaves it: later checkpoints never came."""
    shutil.copytree(out, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > last:
            shutil.rmtree(path)
    return copy


@pytest.mark.parametrize(("last", "extend"), [(12, 4), (20, 4), (16, None)])
def test_an_extension_resumes_bit_identically_from_each_checkpoint(
    chain, longer: Path, tmp_path: Path, last: int, extend: int | None
):
    """With the same command, and without --extend, as the extension is in the checkpoint."""
    out = shortened(longer, tmp_path / "run", last)
    schedule = () if extend is None else ("extension.lr=5e-4", "extension.warmup_epochs=0.5")
    path = run(chain, out, *schedule, extend=extend)
    assert same_weights(path, newest_checkpoint(longer))
    assert metrics(out) == metrics(longer)
    assert metrics(out, "lr") == metrics(longer, "lr")
    assert keys_of_steps(out) == keys_of_steps(longer)


def words(chain, out: Path, extend: int, *overrides: str) -> list[str]:
    options = ["--images", chain.images, "--tokens", chain.tokens, "--out", out, "--device", "cpu", "--extend", extend]
    return [
        *map(str, ["train", "pretrain", *options]),
        *(word for one in [*SETTINGS, *overrides] for word in ("--set", one)),
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_extension_goes_on_with_the_same_command(chain, begun: Path, tmp_path: Path, number: int):
    whole, out = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(begun, whole)
    shutil.copytree(begun, out)
    command = [*warm_command(), *words(chain, out, 5)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(metrics(out)) < 18:
        time.sleep(0.005)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert number == signal.SIGKILL or "Give the same command to resume" in errors
    assert same_weights(run(chain, out, extend=5), run(chain, whole, extend=5))
    assert metrics(out) == metrics(whole)


def test_an_extended_run_is_extended_again(chain, longer: Path, tmp_path: Path):
    shutil.copytree(longer, tmp_path / "run")
    run(chain, tmp_path / "run", "extension.min_lr=0", extend=5)
    first, second = record(tmp_path / "run")["extensions"]
    assert (first["epochs"], second["step"], second["epochs"], second["min_lr"]) == (4, 24, 5, 0)
    assert second["warmup_lr"] == first["min_lr"]
    assert metrics(tmp_path / "run")[:24] == metrics(longer)
    assert len(metrics(tmp_path / "run")) == 30
    out = shortened(tmp_path / "run", tmp_path / "killed", 28)
    assert same_weights(run(chain, out), newest_checkpoint(tmp_path / "run"))


def test_a_repeated_command_does_nothing_more(chain, longer: Path, tmp_path: Path):
    shutil.copytree(longer, tmp_path / "run")
    before = newest_checkpoint(tmp_path / "run").stat().st_mtime_ns
    path = run(chain, tmp_path / "run", "extension.lr=5e-4", "extension.warmup_epochs=0.5", extend=4)
    assert run(chain, tmp_path / "run") == path
    assert path.stat().st_mtime_ns == before


def test_two_processes_extend_the_run_of_one(chain, begun: Path, longer: Path, tmp_path: Path):
    shutil.copytree(begun, tmp_path / "run")
    schedule = ("extension.lr=5e-4", "extension.warmup_epochs=0.5")
    _, errors = finished(torchrun(2, words(chain, tmp_path / "run", 4, *schedule)))
    assert errors.count("to 4 epochs (step 12 to 24)") == 1
    assert metrics(tmp_path / "run") == pytest.approx(metrics(longer), rel=1e-5)
    assert keys_of_steps(tmp_path / "run") == keys_of_steps(longer)


def test_what_cannot_be_extended_is_refused(chain, begun: Path, longer: Path, tmp_path: Path):
    with pytest.raises(UsageError, match=r"goes on with a finished run and .* holds none"):
        run(chain, tmp_path / "new", extend=4)
    assert not (tmp_path / "new").exists() or newest_checkpoint(tmp_path / "new") is None
    unfinished = shortened(begun, tmp_path / "unfinished", 8)
    with pytest.raises(UsageError, match=r"8 of its 12 steps \(2 epochs\) and only a finished run is extended; finish"):
        run(chain, unfinished, extend=4)
    for epochs in (1, 2):
        with pytest.raises(UsageError, match=r"has 2 epochs already and --extend . counts them in; give more than 2"):
            run(chain, begun, extend=epochs)
    with pytest.raises(UsageError, match=r"extended to 4 epochs with another schedule \(extension\.lr was 0\.0005"):
        run(chain, longer, "extension.warmup_epochs=0.5", extend=4)
    with pytest.raises(UsageError, match=r"extension\.warmup_epochs 2 is not shorter than the 2 epochs"):
        run(chain, begun, "extension.warmup_epochs=2", extend=4)
    half = shortened(longer, tmp_path / "half", 20)
    with pytest.raises(UsageError, match="20 of its 24 steps"):
        run(chain, half, extend=6)
    with pytest.raises(UsageError, match=r"optimizer\.lr was 0\.001"):
        run(chain, begun, "optimizer.lr=1", extend=4)
    with pytest.raises(UsageError, match="--resume auto"):
        run(chain, begun, extend=4, resume="never")
    with pytest.raises(UsageError, match="--dry-run estimates a new run"):
        pretrain_dry_run(chain.images, chain.tokens, overrides=SETTINGS, extend=4)
    for wrong in ("lr=0", "min_lr=-1", "warmup_epochs=-1", "lr=inf"):
        with pytest.raises(UsageError, match="extension"):
            run(chain, begun, f"extension.{wrong}", extend=4)
    assert newest_checkpoint(begun).name == "step-0000012"
