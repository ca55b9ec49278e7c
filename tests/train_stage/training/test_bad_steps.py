"""A step whose loss is no number, or a spike, ends a run with its images named, or is left out and counted."""

import json
from pathlib import Path

import pytest
from mapet.shared.errors import DataError
from mapet.train_stage.pretrain import pretrain
from mapet.train_stage.weights.checkpoint import newest_checkpoint

from ..conftest import SHORT, TINY

SETTINGS = [*TINY, *SHORT, "train.batch_size=16", "train.epochs=3", "train.log_every=3"]
# Any loss above the running mean of those before it is a spike; as hardly anything is learnt, about half of them are.
SPIKES = ["train.spike=1.0001", "optimizer.lr=1e-6", "optimizer.min_lr=1e-6"]


def run(chain, out: Path, *overrides: str) -> Path:
    return pretrain(chain.images, chain.tokens, out, overrides=[*SETTINGS, *overrides], device="cpu")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_spike_stops_a_run_and_its_images_are_listed(chain, tmp_path: Path):
    with pytest.raises(DataError, match=r"Step (\d+) has a loss of .*, a spike over .*train\.on_bad_step=skip"):
        run(chain, tmp_path, *SPIKES)
    (bad,) = lines(tmp_path / "bad-steps.jsonl")
    assert len(set(bad["keys"])) == 16
    assert "spike" in bad["problem"]
    # It may be decided now that such steps are left out.
    run(chain, tmp_path, *SPIKES, "train.on_bad_step=skip")


def test_spikes_that_are_skipped_are_counted_and_change_nothing(chain, tmp_path: Path):
    path = run(
        chain, tmp_path / "whole", *SPIKES, "train.on_bad_step=skip", "train.checkpoint_every=4", "train.keep_last=9"
    )
    bad = lines(tmp_path / "whole" / "bad-steps.jsonl")
    logged = lines(tmp_path / "whole" / "metrics.jsonl")
    assert 0 < len(bad) == sum(line["skipped_steps"] for line in logged) < 18
    # From a checkpoint on, the same again.
    for newer in ("step-0000018", "step-0000016", "step-0000012"):
        (tmp_path / "whole" / "checkpoints" / newer).rename(tmp_path / newer)
    assert newest_checkpoint(tmp_path / "whole").name == "step-0000008"
    assert run(chain, tmp_path / "whole", *SPIKES, "train.on_bad_step=skip", "train.checkpoint_every=4") == path
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (path / name).read_bytes() == (tmp_path / "step-0000018" / name).read_bytes()
    assert lines(tmp_path / "whole" / "bad-steps.jsonl") == bad


def test_a_run_whose_every_step_is_bad_gives_up(chain, tmp_path: Path):
    wild = ["optimizer.lr=1e30", "optimizer.clip_grad=null", "train.on_bad_step=skip", "train.epochs=20"]
    with pytest.raises(DataError, match=r"100 steps in a row were bad, the last one with a loss of nan"):
        run(chain, tmp_path, *wild)
    logged = lines(tmp_path / "metrics.jsonl")
    assert logged[-1]["loss"] is None
    assert logged[-1]["skipped_steps"] == 3


def test_a_loss_that_is_no_number_is_named_with_its_step(chain, tmp_path: Path):
    with pytest.raises(DataError, match=r"Step 2 has a loss that is NaN or infinite; its images are listed"):
        run(chain, tmp_path, "optimizer.lr=1e30", "optimizer.clip_grad=null")
    assert [line["step"] for line in lines(tmp_path / "bad-steps.jsonl")] == [2]
    assert newest_checkpoint(tmp_path) is None
