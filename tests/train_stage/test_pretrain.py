"""Training learns, splits batches exactly, and can be stopped anywhere and go on bit-identically."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from mapet.shared.errors import DataError, FingerprintMismatch, UsageError
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.train_stage.export import export
from mapet.train_stage.import_weights import import_weights
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.weights.checkpoint import newest_checkpoint
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ..warm import warm_command, warm_python

TINY = [
    "model.name=null",
    "model.dim=32",
    "model.depth=2",
    "model.heads=2",
    "model.image_size=64",
    "model.patch_size=8",
    "train.epochs=4",
    "train.batch_size=16",
    "optimizer.warmup_epochs=0.5",
    "train.log_every=2",
    "train.checkpoint_every=5",
]


def run(chain, out: Path, *overrides: str, **options) -> Path:
    return pretrain(chain.images, chain.tokens, out, overrides=[*TINY, *overrides], device="cpu", **options)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out)]


def same_checkpoint(one: Path, other: Path) -> bool:
    files = ("model.safetensors", "optimizer.safetensors")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


@pytest.fixture(scope="module")
def undisturbed(chain, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run(chain, out)
    return out


def test_the_loss_falls_and_everything_is_written(undisturbed: Path):
    assert losses(undisturbed)[-1] < losses(undisturbed)[0] - 0.1
    assert [line["step"] for line in lines(undisturbed)] == list(range(2, 25, 2))
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == ["step-0000020", "step-0000024"]
    events = EventAccumulator(str(undisturbed / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(2, 25, 2))
    assert json.loads((undisturbed / "run.json").read_text())["images"] == 96
    assert "betas" in (undisturbed / "settings.yaml").read_text()


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(chain, tmp_path: Path):
    run(
        chain,
        tmp_path,
        "train.log_every=1",
        "optimizer.lr=1e-3",
        "optimizer.min_lr=1e-5",
        "optimizer.warmup_lr=1e-6",
        "optimizer.warmup_epochs=1",
    )
    rates = [line["lr"] for line in lines(tmp_path)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[6] == max(rates) == pytest.approx(1e-3)
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + torch.cos(torch.tensor(torch.pi * t / 18)).item()) / 2 for t in range(18)]
    assert rates[6:] == pytest.approx(cosine, rel=1e-4)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(chain, undisturbed: Path, tmp_path: Path):
    same = run(chain, tmp_path / "same", "data.workers=2")
    other = run(chain, tmp_path / "other", "train.seed=1")
    assert same_checkpoint(newest_checkpoint(undisturbed), same)
    assert not same_checkpoint(newest_checkpoint(undisturbed), other)


def test_accumulation_gives_the_losses_of_the_whole_batch(chain, undisturbed: Path, tmp_path: Path):
    run(chain, tmp_path, "execution.micro_batch=4")
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), rel=1e-5)


def test_bfloat16_stays_near_float32(chain, undisturbed: Path, tmp_path: Path):
    run(chain, tmp_path, "train.precision=bfloat16")
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), rel=2e-2)
    assert losses(tmp_path) != losses(undisturbed)


@pytest.mark.parametrize("objective", ["pim", "mim"])
def test_the_baselines_learn_from_the_same_command(chain, undisturbed: Path, tmp_path: Path, objective: str):
    run(chain, tmp_path, objective=objective)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.1
    assert losses(tmp_path) != losses(undisturbed)
    changed = set((tmp_path / "settings.yaml").read_text().splitlines()) ^ set(
        (undisturbed / "settings.yaml").read_text().splitlines()
    )
    assert changed == {"  name: mapet", f"  name: {objective}"}


COMPILED = pytest.param(
    "compile=true",
    marks=[
        pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
        pytest.mark.campaign,
    ],
)


@pytest.mark.parametrize("execution", ["grad_checkpointing=true", "loss_chunk=5", "loss_chunk=null", COMPILED])
def test_how_a_step_is_executed_does_not_change_the_losses(chain, undisturbed: Path, tmp_path: Path, execution: str):
    run(chain, tmp_path, f"execution.{execution}")
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), rel=1e-5)


def test_compiling_without_a_compiler_is_refused(chain, tmp_path: Path, monkeypatch):
    for name in ("PATH", "CC", "CXX"):
        monkeypatch.setenv(name, "")
    with pytest.raises(UsageError, match="C\\+\\+ compiler"):
        run(chain, tmp_path, "execution.compile=true")
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "no backward pass on the CPU"),
        (["model.dim=24", "model.heads=3"], "at least 16 dimensions; this model has 3 heads in 24"),
    ],
)
def test_flex_attention_is_refused_where_it_cannot_train(chain, tmp_path: Path, overrides: list[str], problem: str):
    with pytest.raises(UsageError, match=problem):
        run(chain, tmp_path, "execution.attention=flex", *overrides)
    assert newest_checkpoint(tmp_path) is None


def test_a_run_may_go_on_under_another_execution(chain, undisturbed: Path, tmp_path: Path):
    run(chain, tmp_path, "train.epochs=2")
    with pytest.raises(UsageError, match=r"train\.epochs was 2"):
        run(chain, tmp_path, "execution.loss_chunk=5")
    before = (tmp_path / "metrics.jsonl").read_text()
    run(chain, tmp_path, "train.epochs=2", "execution.loss_chunk=5")
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_starts_from_weights_of_another_size_and_codebook(chain, undisturbed: Path, tmp_path: Path, capsys):
    start = load_file(newest_checkpoint(undisturbed) / "model.safetensors")
    still = ["train.epochs=1", "optimizer.lr=1e-30", "optimizer.min_lr=0", "optimizer.warmup_lr=0"]
    path = run(chain, tmp_path / "same", *still, init=undisturbed)
    found = load_file(path / "model.safetensors")
    assert all(torch.equal(found[name], start[name]) for name in start)
    folder = import_weights(undisturbed, tmp_path / "larger", image_size=128)
    capsys.readouterr()
    resized = run(chain, tmp_path / "resized", *still, init=folder)
    assert "Starting from" in capsys.readouterr().err
    assert torch.equal(
        load_file(resized / "model.safetensors")["blocks.1.mlp.fc2.weight"], start["blocks.1.mlp.fc2.weight"]
    )
    fresh = run(chain, tmp_path / "encoder", *still, init=export(undisturbed, tmp_path / "timm"))
    assert "decoder.weight" in capsys.readouterr().err
    assert not torch.equal(load_file(fresh / "model.safetensors")["decoder.weight"], start["decoder.weight"])
    assert json.loads((tmp_path / "encoder" / "run.json").read_text())["init"]["file"].startswith(
        str(tmp_path / "timm")
    )


def test_a_run_goes_on_from_its_checkpoint_and_not_from_init(chain, undisturbed: Path, tmp_path: Path):
    out, short = tmp_path / "run", "train.epochs=1"
    first = run(chain, out, short, init=undisturbed)
    assert run(chain, out, short, init=undisturbed) == run(chain, out, short) == first
    other = import_weights(first, tmp_path / "other")
    with pytest.raises(UsageError, match="not from"):
        run(chain, out, short, init=other)


def test_weights_of_another_encoder_are_no_start(chain, undisturbed: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="has depth 2 and the run's model 3"):
        run(chain, tmp_path, "model.depth=3", init=undisturbed)
    assert newest_checkpoint(tmp_path) is None


def start(chain, out: Path, *overrides: str, command: Sequence[str] = ()) -> subprocess.Popen:
    options = [word for setting in [*TINY, *overrides] for word in ("--set", setting)]
    arguments = [
        "train",
        "pretrain",
        "--images",
        chain.images,
        "--tokens",
        chain.tokens,
        "--out",
        out,
        "--device",
        "cpu",
    ]
    return subprocess.Popen(
        [*(command or warm_command()), *map(str, arguments), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and f'"step": {step},' in (out / "metrics.jsonl").read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {process.communicate()[1]}")


@pytest.mark.parametrize("step", [2, 8, 14])
def test_a_killed_run_goes_on_bit_identically(chain, undisturbed: Path, tmp_path: Path, step: int):
    process = start(chain, tmp_path)
    wait_for_step(tmp_path, step, process)
    process.kill()
    process.wait()
    path = run(chain, tmp_path)
    assert same_checkpoint(newest_checkpoint(undisturbed), path)
    assert losses(tmp_path) == pytest.approx(losses(undisturbed), rel=0, abs=0)


def test_what_is_drawn_for_each_step_is_drawn_again_after_a_stop(chain, tmp_path: Path):
    drawn = ["objective.visible_to=40", "objective.visible_change=random", "objective.query_rows=7"]
    drawn += ["objective.permutation=block", "train.checkpoint_every=3", "train.epochs=3"]
    process = start(chain, tmp_path / "stopped", *drawn)
    wait_for_step(tmp_path / "stopped", 6, process)
    process.kill()
    process.wait()
    assert same_checkpoint(run(chain, tmp_path / "stopped", *drawn), run(chain, tmp_path / "whole", *drawn))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_writes_a_checkpoint_and_says_how_to_go_on(chain, undisturbed: Path, tmp_path: Path, number: int):
    process = start(chain, tmp_path, "train.checkpoint_every=1000")
    wait_for_step(tmp_path, 4, process)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Give the same command to resume" in errors
    assert "Traceback" not in errors
    assert newest_checkpoint(tmp_path) is not None
    assert same_checkpoint(newest_checkpoint(undisturbed), run(chain, tmp_path, "train.checkpoint_every=1000"))


IN_A_GROUP = """
import os
os.setpgrp()
print(os.getpid(), flush=True)
from mapet.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_with_all_its_processes_writes_a_checkpoint(chain, tmp_path: Path, number: int):
    """As a terminal's Ctrl-C does, and a scheduler that signals all processes of a job."""
    many = ["data.workers=2", "train.checkpoint_every=1000", "train.epochs=40"]
    process = start(chain, tmp_path, *many, command=[*warm_python(), "-c", IN_A_GROUP])
    wait_for_step(tmp_path, 4, process)
    os.killpg(int(process.stdout.readline()), number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Give the same command to resume" in errors
    assert "Traceback" not in errors
    assert newest_checkpoint(tmp_path) is not None


def test_a_finished_run_is_not_trained_again(chain, tmp_path: Path):
    path = run(chain, tmp_path, "train.epochs=1")
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert run(chain, tmp_path, "train.epochs=1") == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_a_damaged_checkpoint_is_passed_over(chain, tmp_path: Path, capfd):
    path = run(chain, tmp_path, "train.epochs=1")
    torn = path.with_name(".step-0000099.partial")
    torn.mkdir()
    assert newest_checkpoint(tmp_path) == path
    whole = {name: (path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}
    (path / "model.safetensors").write_bytes(whole["model.safetensors"][:1000])
    assert run(chain, tmp_path, "train.epochs=1") == path
    assert f"{path / 'model.safetensors'} is damaged" in capfd.readouterr().err
    assert {name: (path / name).read_bytes() for name in whole} == whole
    for one in (tmp_path / "checkpoints").iterdir():
        (one / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"All checkpoints in .* are damaged"):
        run(chain, tmp_path, "train.epochs=1")


def test_going_on_with_other_settings_is_refused_by_name(chain, tmp_path: Path):
    run(chain, tmp_path, "train.epochs=1")
    with pytest.raises(UsageError, match=r"optimizer\.lr was 0\.0015 and is 0\.1"):
        run(chain, tmp_path, "train.epochs=1", "optimizer.lr=0.1")
    with pytest.raises(UsageError, match="--resume auto"):
        run(chain, tmp_path, "train.epochs=1", resume="never")
    with pytest.raises(UsageError, match="--resume maybe"):
        run(chain, tmp_path, resume="maybe")


def test_going_on_with_other_images_is_refused(chain, tmp_path: Path):
    run(chain, tmp_path, "train.epochs=1")
    with pytest.raises(DataError, match="96 images and --images now gives 32"):
        pretrain(chain.tars[0], chain.tokens, tmp_path, overrides=[*TINY, "train.epochs=1"], device="cpu")


def test_tokens_of_another_codebook_are_refused(chain, tower, tmp_path: Path):
    run(chain, tmp_path / "run", "train.epochs=1")
    build_codebook(chain.images, tmp_path / "codebook", tower=tower, k=16, restarts=1, iterations=2, seed=5)
    encode_shards(chain.images, tmp_path / "codebook", tmp_path / "tokens")
    with pytest.raises(FingerprintMismatch, match="codebook"):
        pretrain(chain.images, tmp_path / "tokens", tmp_path / "run", overrides=[*TINY, "train.epochs=1"])


def test_a_run_does_not_go_on_with_other_views_than_it_began_with(chain, tmp_path: Path):
    views = {"crop": "random-resized", "batch_size": 16}
    encode_shards(chain.images, chain.codebook, tmp_path / "tokens", views=2, **views)
    arguments = {"overrides": [*TINY, "train.epochs=1"], "device": "cpu"}
    pretrain(chain.images, tmp_path / "tokens", tmp_path / "run", **arguments)
    encode_shards(chain.images, chain.codebook, tmp_path / "tokens", views=3, **views)
    with pytest.raises(UsageError, match=r"was begun with the views .*'views': 2.* now has .*'views': 3"):
        pretrain(chain.images, tmp_path / "tokens", tmp_path / "run", **arguments)


def test_a_batch_larger_than_the_images_is_refused(chain, tmp_path: Path):
    with pytest.raises(UsageError, match="larger than the 96 images"):
        run(chain, tmp_path, "train.batch_size=128")


def test_a_loss_that_becomes_nan_stops_the_run(chain, tmp_path: Path):
    wild = ["optimizer.lr=1e30", "optimizer.clip_grad=null", "optimizer.warmup_epochs=0", "train.checkpoint_every=1"]
    with pytest.raises(DataError, match="NaN"):
        run(chain, tmp_path, *wild, "train.log_every=100")
    last = newest_checkpoint(tmp_path)
    assert last is None or last.name == "step-0000001"


def test_no_weight_decay_on_biases_norms_layer_scale_positions_and_class_token(chain, tmp_path: Path):
    """With lr * weight_decay = 1 a decayed weight loses its past in one step; the others keep theirs."""
    overrides = ["train.epochs=1", "train.batch_size=96", "optimizer.warmup_epochs=0", "optimizer.lr=1e-3"]
    plain = load_file(run(chain, tmp_path / "plain", *overrides, "optimizer.weight_decay=0") / "model.safetensors")
    decayed = load_file(
        run(chain, tmp_path / "decayed", *overrides, "optimizer.weight_decay=1000") / "model.safetensors"
    )
    changed = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    matrices = {name for name, tensor in plain.items() if tensor.ndim > 1} - {"pos_embed", "cls_token"}
    assert changed == matrices
