"""Crops of images and their masks."""

from pathlib import Path

import numpy as np
import pytest
from mapet.quickstart.drawings import draw, write_drawings
from mapet.shared.images.views import Preprocess
from mapet.shared.sources.options import DEFAULT
from mapet.train_stage.masked.crops import Place, RandomCrops, WholeImages, places
from mapet.train_stage.masked.masked_images import masked_images
from mapet.train_stage.masked.masks import IGNORED, MaskRule
from PIL import Image

PREPROCESS = Preprocess(32, "shortest", 32, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("masked")
    write_drawings(folder, 4, seed=3, masks=True)
    return masked_images(folder, DEFAULT, "seg.png")


def test_crops_are_a_function_of_seed_step_and_key(images):
    crops = RandomCrops(images, MaskRule(), PREPROCESS, seed=1)
    drawn = list(places(len(images), 3, 2, seed=1))
    first, again = crops(drawn[2][1]), crops(drawn[2][1])
    assert all(np.array_equal(first[name], again[name]) for name in first)
    other = RandomCrops(images, MaskRule(), PREPROCESS, seed=2)(drawn[2][1])
    assert not np.array_equal(first["pixels"], other["pixels"])


def test_every_image_comes_once_an_epoch():
    drawn = [place for step in places(5, 6, 3, seed=0) for place in step]
    assert [place.step for place in drawn] == [step for step in range(6) for _ in range(3)]
    assert [sorted(place.image for place in drawn[at : at + 5]) for at in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3


def test_the_pixels_and_the_mask_of_a_crop_show_the_same_place(tmp_path: Path):
    """An image of four greys, whose mask says which: away from edges, a crop's greys are those of its classes."""
    classes = np.kron(np.array([[0, 1], [2, 3]], np.uint8), np.ones((30, 40), np.uint8))
    for folder, values in (("images", classes * 80), ("annotations", classes)):
        (tmp_path / folder).mkdir()
        Image.fromarray(values).save(tmp_path / folder / "four.png")
    crops = RandomCrops(masked_images(tmp_path, DEFAULT, "seg.png"), MaskRule(), PREPROCESS, seed=1)
    seen = set()
    for step in range(16):
        one = crops(Place(step, 0))
        mask, pixels = one["mask"], one["pixels"].astype(int)
        assert (mask.shape, pixels.shape) == ((32, 32), (3, 32, 32))
        windows_of = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 3, constant_values=-2), (7, 7))
        inside = (windows_of == mask[:, :, None, None]).all((2, 3))
        inside &= mask != IGNORED
        assert (np.abs(pixels[:, inside] - mask[inside] * 80) <= 2).all()
        assert (pixels[:, mask == IGNORED] == 128).all()  # the mean colour, where a small image ends
        seen.add(tuple(np.unique(mask).tolist()))
    assert len(seen) > 2  # crops of several places
    assert any(IGNORED in classes for classes in seen)  # and of images that were smaller than a crop


def test_whole_images_keep_their_masks(images):
    whole = WholeImages(images, MaskRule(), PREPROCESS)(2)
    assert whole["pixels"].shape == (3, 32, 32)
    assert np.array_equal(whole["mask"], np.asarray(draw(2, 3).mask))
