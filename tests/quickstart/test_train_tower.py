"""The tower that ships with the demo opens with open_clip alone and knows drawings it has never seen."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from mapet.quickstart.drawings import CLASSES, draw

TOWER = Path(__file__).parents[2] / "quickstart" / "tower"


@pytest.fixture(scope="module")
def tower() -> tuple[torch.nn.Module, torch.Tensor]:
    """The model and 200 preprocessed drawings of a series that neither the training nor the demo uses."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{TOWER}")
    images = torch.stack([preprocess(draw(index, seed=3000).image) for index in range(200)])
    return model.eval(), images


def test_assets_stay_small():
    assert sum(path.stat().st_size for path in TOWER.parent.rglob("*") if path.is_file()) <= 4_300_000


@pytest.mark.parametrize("layer", [-1, -2])
@torch.inference_mode()
def test_patch_grid_is_8_by_8(tower: tuple[torch.nn.Module, torch.Tensor], layer: int):
    model, images = tower
    result = model.visual.forward_intermediates(images[:2], indices=[layer], intermediates_only=True)
    assert result["image_intermediates"][0].shape == (2, 128, 8, 8)


@torch.inference_mode()
def test_zero_shot_is_far_above_chance(tower: tuple[torch.nn.Module, torch.Tensor]):
    model, images = tower
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TOWER}")
    text = model.encode_text(tokenizer([f"a drawing of a {name}." for name in CLASSES]), normalize=True)
    predicted = (model.encode_image(images, normalize=True) @ text.T).argmax(1).numpy()
    assert np.mean(predicted == np.arange(200) % len(CLASSES)) > 0.5
