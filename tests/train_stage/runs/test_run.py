"""What a run leaves behind: curves that can be trusted, and all that is needed to do it again."""

import io
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from mapet.shared.errors import DataError, UsageError
from mapet.shared.storage.lock import sole_writer
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.probe import probe
from mapet.train_stage.runs.metrics import Logbook
from mapet.train_stage.settings import resolve
from mapet.train_stage.tasks import pretraining_loss
from mapet.train_stage.training.step_metrics import StepMetrics
from mapet.train_stage.weights.checkpoint import newest_checkpoint
from mapet.train_stage.weights.read import load_weights
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.utils import ModelEmaV3
from torch import nn

from ...warm import warm_python
from ..conftest import SHORT, TINY

BANDS = pretraining_loss.BANDS.count
SETTINGS = [*TINY, *SHORT, "train.batch_size=16", "train.log_every=3"]


def run(chain, out: Path, *overrides: str) -> Path:
    return pretrain(chain.images, chain.tokens, out, overrides=[*SETTINGS, *overrides], device="cpu")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_means_over_its_steps(tmp_path: Path):
    pending = [StepMetrics(2.0, [1.0] * BANDS, [4] * BANDS, 0.5, 16, 0.1)]
    with Logbook(
        tmp_path / "metrics.jsonl",
        1,
        pending,
        every=2,
        steps=4,
        steps_per_epoch=4,
        bands="rank",
        peak_images_per_second=1e6,
    ) as logbook:
        right = torch.tensor([3.0] + [0.0] * (BANDS - 1))
        assert logbook.log(2, StepMetrics(torch.tensor(4.0), right, [4] * BANDS, 1.5, 16, 0.2), 0.0)
        logbook.log(3, StepMetrics(9.0, right, [4] * BANDS, 1.5, 16, 0.3, "a loss of nan"), 0.0)
        logbook.log(4, StepMetrics(1.0, right, [4, 4] + [0] * (BANDS - 2), 2.5, 16, 0.4), 0.0)
    first, second = lines(tmp_path / "metrics.jsonl")
    names = ("step", "epoch", "loss", "lr", "gradient_norm")
    assert [first[name] for name in names] == [2, 0.5, 3.0, 0.2, 1.0]
    assert first["accuracy"] == pytest.approx((BANDS + 3) / (8 * BANDS))
    assert first["accuracy_by_rank"] == [0.5] + [1 / 8] * (BANDS - 1)
    assert (second["loss"], second["skipped_steps"], second["lr"]) == (1.0, 1, 0.4)
    assert second["accuracy_by_rank"] == [0.75, 0.0] + [None] * (BANDS - 2)
    assert second["mfu"] == pytest.approx(second["images_per_second"] / 1e6, abs=1e-4)
    assert 0 <= second["data_wait"] <= 1


def test_accuracy_by_rank_makes_up_the_accuracy_and_tensorboard_shows_both(chain, tmp_path: Path):
    run(chain, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for line in lines(tmp_path / "metrics.jsonl"):
        assert sum(line["accuracy_by_rank"]) / BANDS == pytest.approx(line["accuracy"])
        assert line["memory_mb"] > 50
        assert "mfu" not in line  # nobody states the CPU's peak
    assert [event.step for event in events.Scalars("accuracy_by_rank/7")] == [3, 6, 9, 12]


def test_the_folder_says_how_to_do_it_again(chain, tmp_path: Path):
    run(chain, tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert (
        record["codebook_fingerprint"]
        == json.loads((chain.tokens / "manifest.json").read_text())["codebook_fingerprint"]
    )
    (start,) = record["starts"]
    assert start["step"] == 0
    assert start["command"] == sys.argv
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert resolve(tmp_path / "settings.yaml") == resolve(overrides=SETTINGS)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0:
        assert start["git"]["commit"] == head.stdout.strip()
    run(chain, tmp_path)
    assert [start["step"] for start in json.loads((tmp_path / "run.json").read_text())["starts"]] == [0, 12]


def test_the_moving_average_is_what_is_used_and_it_is_the_average(chain, tmp_path: Path):
    """With one step an epoch and a checkpoint of each, the average can be followed from checkpoint to checkpoint."""
    path = run(chain, tmp_path, "train.ema=0.75", "train.batch_size=96", "train.epochs=4", "train.checkpoint_every=1",
               "train.keep_last=9")  # fmt: skip
    steps = sorted((tmp_path / "checkpoints").iterdir())
    assert steps[-1] == path
    for before, after in pairwise(steps):
        average, now, then = (
            load_file(folder / name)["cls_token"]
            for folder, name in (
                (before, "ema.safetensors"),
                (after, "model.safetensors"),
                (after, "ema.safetensors"),
            )
        )
        assert torch.allclose(then, 0.75 * average + 0.25 * now, rtol=1e-5)
    used = load_weights(tmp_path)
    assert torch.equal(used.tensors["cls_token"], load_file(path / "ema.safetensors")["cls_token"])
    assert not torch.equal(used.tensors["cls_token"], load_file(path / "model.safetensors")["cls_token"])
    used.mapet()


def test_the_decay_of_the_moving_average_warms_up_as_in_timm(chain, tmp_path: Path):
    path = run(chain, tmp_path, "train.ema=0.6", "train.ema_warmup=true", "train.batch_size=96", "train.epochs=4",
               "train.checkpoint_every=1", "train.keep_last=9")  # fmt: skip
    followed = None
    theirs = ModelEmaV3(nn.Linear(1, 1), decay=0.6, use_warmup=True, warmup_gamma=1.0, warmup_power=2 / 3)
    decays = []
    for number, step in enumerate(sorted((tmp_path / "checkpoints").iterdir()), start=1):
        decays.append(theirs.get_decay(number))
        now = load_file(step / "model.safetensors")["cls_token"]
        followed = now if followed is None else decays[-1] * followed + (1 - decays[-1]) * now
        assert torch.allclose(load_file(step / "ema.safetensors")["cls_token"], followed, rtol=1e-5, atol=1e-8)
    assert step == path
    assert decays[0] == 0 < decays[1] < decays[2] < decays[3] == 0.6  # all of the warm-up, and its end


@pytest.mark.usefixtures("short_fits")
def test_a_run_is_probed_as_it_goes_on_and_that_changes_nothing_in_it(chain, tmp_path: Path):
    sets = [f"probe.images={chain.images}", f"probe.val={chain.tars[0]}", "probe.every=5", "probe.linear=true"]
    probed = run(chain, tmp_path / "probed", *sets)
    found = lines(tmp_path / "probed" / "probe.jsonl")
    assert [line["step"] for line in found] == [5, 10, 12]
    (last,) = probe(tmp_path / "probed", chain.images, chain.tars[0], device="cpu")
    assert (found[-1]["linear"], found[-1]["knn"]) == pytest.approx((last.linear, last.knn), abs=1e-6)
    events = EventAccumulator(str(tmp_path / "probed" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("probe/knn")] == [5, 10, 12]
    alone = run(chain, tmp_path / "alone")
    assert (probed / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_a_probe_of_images_without_labels_is_refused_before_training(chain, tmp_path: Path, write_tar):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    unlabelled = write_tar(tmp_path / "plain.tar", {"a.png": picture.getvalue()})
    with pytest.raises(DataError, match="have no label"):
        run(chain, tmp_path / "run", f"probe.images={chain.images}", f"probe.val={unlabelled}")
    assert newest_checkpoint(tmp_path / "run") is None


def test_a_folder_that_another_process_trains_in_is_refused(chain, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("mapet.shared.storage.lock._LONGEST_WAIT", 0.5)
    with (
        sole_writer(tmp_path),
        pytest.raises(UsageError, match=r"Another process is writing to .*; wait until it ends"),
    ):
        run(chain, tmp_path)
    run(chain, tmp_path)
    run(chain, tmp_path, "train.log_every=5")  # it was let go


WITH_WANDB = """
import sys
from mapet.train_stage.pretrain import pretrain
pretrain(sys.argv[1], sys.argv[2], sys.argv[3], overrides=sys.argv[4:], device="cpu")
"""


def test_weights_and_biases_gets_the_lines_too(chain, tmp_path: Path):
    words = [chain.images, chain.tokens, tmp_path / "run", *SETTINGS, "train.wandb=mine"]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    result = subprocess.run(
        [*warm_python(), "-c", WITH_WANDB, *map(str, words)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (stored,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = stored.read_bytes()
    for name in (b"accuracy_by_rank/7", b"gradient_norm", (tmp_path / "run" / "wandb-id.txt").read_bytes()):
        assert name in content


def test_weights_and_biases_that_is_not_installed_is_one_sentence(chain, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        run(chain, tmp_path, "train.wandb=mine")
