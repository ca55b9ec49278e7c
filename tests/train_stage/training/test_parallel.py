"""Any number of processes train one run: the same batches, the same losses, one ending. Real torchrun processes."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.weights.checkpoint import newest_checkpoint
from safetensors.torch import load_file

from ...warm import COLD_TORCHRUN, processes_of, warm_command, warm_torchrun

SETTINGS = [
    "model.name=null",
    "model.dim=32",
    "model.depth=2",
    "model.heads=2",
    "model.image_size=64",
    "model.patch_size=8",
    "train.epochs=7",
    "train.batch_size=32",
    "optimizer.warmup_epochs=0.5",
    "train.log_every=1",
    "train.log_keys=true",
    "train.ema=0.9",
]
STEPS = 21


def arguments(chain, out: Path, *overrides: str, images: Path | None = None) -> list[str]:
    options = ["--images", images or chain.images, "--tokens", chain.tokens, "--out", out, "--device", "cpu"]
    settings = [word for setting in [*SETTINGS, *overrides] for word in ("--set", setting)]
    return ["train", "pretrain", *map(str, options), *settings]


def torchrun(processes: int, words: list[str], *options: str, warm: bool = True) -> subprocess.Popen:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [*(warm_torchrun() if warm else COLD_TORCHRUN), "--nproc-per-node", str(processes), "--no-python"]
    command = [*warm_command(), *words]
    return subprocess.Popen(
        [*launch, "--master-port", str(port), *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output, errors


def metrics(out: Path, name: str = "loss") -> list:
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


def keys_of_steps(out: Path) -> dict[int, list[str]]:
    """The keys that each step saw, in all processes, sorted."""
    found: dict[int, list[str]] = {}
    for path in (out / "keys").glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            found[line["step"]] = sorted([*found.get(line["step"], []), *line["keys"]])
    return found


def same_weights(one: Path, other: Path) -> bool:
    names = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def alone(chain, tmp_path_factory) -> Path:
    """One process, the whole batch at once."""
    out = tmp_path_factory.mktemp("alone") / "run"
    overrides = [*SETTINGS]
    pretrain(chain.images, chain.tokens, out, overrides=overrides, device="cpu")
    return out


@pytest.fixture(scope="module")
def two(chain, tmp_path_factory) -> Path:
    """Two processes with DDP."""
    out = tmp_path_factory.mktemp("two") / "run"
    output, errors = finished(torchrun(2, arguments(chain, out)))
    assert output.count("masked-token accuracy") == 1  # the first process speaks for both
    assert "Traceback" not in errors
    return out


def test_two_processes_have_the_losses_and_the_batches_of_one(alone: Path, two: Path):
    assert metrics(two) == pytest.approx(metrics(alone), rel=1e-5)
    assert metrics(two, "gradient_norm") == pytest.approx(metrics(alone, "gradient_norm"), rel=1e-4)
    assert metrics(two, "accuracy_by_rank") == metrics(alone, "accuracy_by_rank")
    assert keys_of_steps(two) == keys_of_steps(alone)
    for epoch in range(7):
        seen = [key for step in range(3 * epoch + 1, 3 * epoch + 4) for key in keys_of_steps(two)[step]]
        assert len(set(seen)) == len(seen) == 96


def test_accumulation_has_the_losses_of_the_whole_batch(chain, alone: Path, tmp_path: Path):
    overrides = [*SETTINGS, "execution.micro_batch=16"]
    pretrain(chain.images, chain.tokens, tmp_path / "run", overrides=overrides, device="cpu")
    assert metrics(tmp_path / "run") == pytest.approx(metrics(alone), rel=1e-5)


def test_sharded_weights_have_the_losses_and_checkpoints_of_whole_ones(chain, two: Path, tmp_path: Path):
    words = arguments(chain, tmp_path / "run", "execution.parallel=fsdp", "execution.micro_batch=8")
    finished(torchrun(2, words))
    assert metrics(tmp_path / "run") == pytest.approx(metrics(two), rel=1e-5)
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        ours, theirs = (load_file(newest_checkpoint(out) / name) for out in (tmp_path / "run", two))
        assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and f'"step": {step},' in (out / "metrics.jsonl").read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {process.communicate()[1]}")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_that_were_asked_to_stop_are_gone_on_with_by_one(
    chain, alone: Path, tmp_path: Path, parallel: str
):
    out, overrides = tmp_path / "run", (f"execution.parallel={parallel}", "train.checkpoint_every=1000")
    process = torchrun(2, arguments(chain, out, *overrides))
    wait_for_step(out, 4, process)
    os.kill(processes_of(out)[1], signal.SIGTERM)  # whichever process is asked, all stop after the same step
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("mapet: Stopped after step") == 1
    stopped = newest_checkpoint(out)
    assert stopped is not None
    assert stopped.name != f"step-{STEPS:07d}"
    pretrain(chain.images, chain.tokens, out, overrides=[*SETTINGS, *overrides], device="cpu")
    assert metrics(out) == pytest.approx(metrics(alone), rel=1e-5)
    assert keys_of_steps(out) == keys_of_steps(alone)


@pytest.mark.campaign
def test_torchrun_restarts_what_a_killed_process_ended_and_it_ends_bit_identical(chain, two: Path, tmp_path: Path):
    out = tmp_path / "run"
    process = torchrun(2, arguments(chain, out, "train.checkpoint_every=3"), "--max-restarts", "1", warm=False)
    wait_for_step(out, 5, process)
    os.kill(processes_of(out)[0], signal.SIGKILL)
    _, errors = finished(process)
    assert "Resuming from" in errors
    assert same_weights(newest_checkpoint(out), newest_checkpoint(two))
    assert metrics(out) == metrics(two)


@pytest.mark.campaign
def test_processes_whose_torchrun_was_killed_stop_before_others_go_on(chain, two: Path, tmp_path: Path):
    out = tmp_path / "run"
    words = arguments(chain, out, "train.checkpoint_every=3", "train.epochs=7")
    process = torchrun(2, words, warm=False)
    wait_for_step(out, 2, process)
    process.kill()  # its workers are not told
    finished(torchrun(2, words))
    assert same_weights(newest_checkpoint(out), newest_checkpoint(two))
    assert keys_of_steps(out) == keys_of_steps(two)
    assert metrics(out) == metrics(two)
    process.communicate()


def test_a_process_that_fails_ends_the_run_with_its_reason(chain, tmp_path: Path, write_folder):
    """One image of 96 is damaged; whichever process meets it says so, and the other one does not hang."""
    tars = {path.name: path.read_bytes() for path in chain.tars}
    name, data = next(iter(tars.items()))
    at = data.index(b"\xff\xda") + 200
    images = write_folder(tmp_path / "images", {**tars, name: data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]})
    process = torchrun(2, arguments(chain, tmp_path / "run", images=images))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "is not the one that was encoded" in errors
    assert "another one ended; its message says why" in errors
    assert "KeyboardInterrupt" not in errors
    assert errors.count("Traceback") == 1  # torchrun's own, which says which process was first


def test_a_batch_that_the_processes_cannot_share_is_refused(chain, tmp_path: Path):
    process = torchrun(2, arguments(chain, tmp_path / "run", "train.batch_size=31"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("mapet: train.batch_size 31 is not a multiple of the 2 processes.") == 1
    assert not (tmp_path / "run").exists()
