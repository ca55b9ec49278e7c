"""Weights in a local file that may need QuickGELU are warned about, and no others."""

from pathlib import Path

import pytest
import torch
from mapet.tokenize_stage.towers.clip_towers import quick_gelu_warning


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A TorchScript archive, as which OpenAI's weights come."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def plain_file(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"weight": torch.zeros(2)}, folder / "weights.pt")
    return folder / "weights.pt"


def test_openais_archive_is_recognised(archive: Path):
    warning = quick_gelu_warning("ViT-B-32", archive)
    assert "OpenAI's weights" in warning
    assert "--tower ViT-B-32-quickgelu" in warning


def test_openais_name_is_recognised(tmp_path: Path):
    assert "OpenAI's weights" in quick_gelu_warning("ViT-B/32", plain_file(tmp_path / "clip-openai"))


def test_a_file_that_tells_nothing_is_named(tmp_path: Path):
    warning = quick_gelu_warning("ViT-B-32", plain_file(tmp_path / "laion"))
    assert "does not tell its activation" in warning
    assert "--tower ViT-B-32-quickgelu" in warning


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-SO400M-14-SigLIP"])
def test_a_tower_with_quick_gelu_or_without_such_a_sibling_is_not_warned_about(archive: Path, name: str):
    assert quick_gelu_warning(name, archive) is None
