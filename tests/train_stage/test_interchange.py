"""Weights from elsewhere are read without running anything in them, or refused with one sentence."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from mapet.shared.errors import DataError
from mapet.train_stage.interchange import load_published, load_weights

ORACLE = Path(__file__).parent / "oracle"


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_published_checkpoint_gives_its_shape():
    shape = load_published(ORACLE / "pretrain.pth.tar").shape
    assert (shape.dim, shape.depth, shape.heads, shape.patch_size, shape.image_size, shape.k) == (48, 2, 3, 16, 64, 32)


def test_module_prefixes_are_read(tmp_path: Path):
    checkpoint = torch.load(ORACLE / "pretrain.pth.tar", weights_only=False)
    checkpoint["state_dict"] = {f"module.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "prefixed.pth.tar")
    plain, prefixed = (load_published(path) for path in (ORACLE / "pretrain.pth.tar", tmp_path / "prefixed.pth.tar"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), prefixed.parameters(), strict=True))


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path: Path):
    witness = tmp_path / "witness"
    torch.save({"state_dict": {}, "args": Malicious(witness)}, tmp_path / "bad.pth.tar")
    with pytest.raises(DataError, match="nothing in it was run"):
        load_published(tmp_path / "bad.pth.tar")
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 broken zip"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "junk.pth.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"junk\.pth\.tar"):
        load_published(tmp_path / "junk.pth.tar")


def test_a_fine_tuned_checkpoint_is_not_taken_for_a_pre_trained_one():
    with pytest.raises(DataError, match="no pre-training checkpoint"):
        load_published(ORACLE / "finetune.pth.tar")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path):
    state = dict(torch.load(ORACLE / "pretrain.pth.tar", weights_only=False)["state_dict"])
    del state["norm.bias"]
    torch.save({"state_dict": state, "arch": "mapet_tiny", "args": argparse.Namespace()}, tmp_path / "a.pth.tar")
    with pytest.raises(DataError, match="does not hold the weights"):
        load_published(tmp_path / "a.pth.tar")


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="neither a run"):
        load_weights(tmp_path)
