"""Checkpoints are written while training continues, pruned, and used only if no byte has changed."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mapet.shared.errors import DataError
from mapet.train_stage.weights.checkpoint import (
    Checkpoints,
    check_whole,
    load_tensors,
    newest_checkpoint,
    newest_whole_checkpoint,
    read_state,
)

METADATA = {"settings": {"a": 1}}


def tensors(value: float) -> dict:
    return {
        "model.safetensors": {"w": torch.full((1000,), value)},
        "optimizer.safetensors": {"w/step": torch.tensor(1)},
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(run, keep_last=9, keep_every=None)
    for step in (1, 2):
        checkpoints.save(step, tensors(step), METADATA)
    assert checkpoints.finish() == newest_checkpoint(run)
    return run


def test_changes_after_save_are_not_written(tmp_path: Path):
    checkpoints, content = Checkpoints(tmp_path, 2, None), tensors(1)
    checkpoints.save(1, content, METADATA)
    content["model.safetensors"]["w"].fill_(2)
    path = checkpoints.finish()
    assert torch.equal(load_tensors(path, "model.safetensors")["w"], torch.full((1000,), 1.0))
    assert read_state(path)["settings"] == {"a": 1}


def test_the_newest_stay_and_those_at_multiples(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, tensors(step), METADATA)
    checkpoints.finish()
    steps = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [4, 8, 9, 10]


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), file=st.integers(0, 2))
def test_a_checkpoint_of_which_a_byte_has_changed_is_skipped(written: Path, place: float, flip: int, file: int):
    path = newest_checkpoint(written) / ("model.safetensors", "optimizer.safetensors", "state.json")[file]
    whole = path.read_bytes()
    at = int(place * len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    try:
        checkpoint, state = newest_whole_checkpoint(written)
        assert (checkpoint.name, state["step"]) == ("step-0000001", 1)
    finally:
        path.write_bytes(whole)
    assert newest_whole_checkpoint(written)[1]["step"] == 2


def test_a_failure_to_write_is_raised_at_the_next_checkpoint(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpoints = Checkpoints(tmp_path, 2, None)
    checkpoints.save(1, tensors(1), METADATA)
    with pytest.raises(DataError, match="could not be written"):
        checkpoints.save(2, tensors(2), METADATA)


def test_a_checkpoint_of_another_version_is_refused_by_name(written: Path, tmp_path: Path):
    state = json.loads((newest_checkpoint(written) / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps({**state, "version": 99}))
    with pytest.raises(DataError, match="version 99"):
        check_whole(tmp_path)
