"""Images find their masks in tars and in folders side by side."""

from pathlib import Path

import numpy as np
import pytest
from mapet.quickstart.drawings import draw, write_drawings
from mapet.shared.errors import DataError
from mapet.shared.images.decode import read_image
from mapet.shared.sources.options import DEFAULT
from mapet.train_stage.masked.masked_images import check_masks, masked_images
from mapet.train_stage.masked.masks import MaskRule, read_mask


def test_masks_in_tars(tmp_path: Path):
    write_drawings(tmp_path, 5, seed=6, per_tar=3, masks=True)
    pairs = masked_images(tmp_path, DEFAULT, "seg.png")
    assert [pair.image.key for pair in pairs] == [draw(index, 6).key for index in range(5)]
    for index, pair in enumerate(pairs):
        assert pair.mask.key == pair.image.key
        assert np.array_equal(read_mask(pair.mask, MaskRule(())), np.asarray(draw(index, 6).mask))
        assert read_image(pair.image)[0].size == (64, 64)


def test_ade20ks_folders(write_folder, png, jpeg, tmp_path: Path):
    names = [f"{split}/ADE_{number}" for split in ("training", "validation") for number in (1, 2)]
    masks = {name: np.full((64, 64), at, np.uint8) for at, name in enumerate(names)}
    files = {f"images/{name}.jpg": jpeg for name in names}
    root = write_folder(tmp_path / "ade", files | {f"annotations/{name}.png": png(masks[name]) for name in names})
    pairs = masked_images(root / "images" / "training", DEFAULT, "seg.png")
    assert [(pair.image.key, read_mask(pair.mask, MaskRule(())).max()) for pair in pairs] == [
        ("ADE_1", 0),
        ("ADE_2", 1),
    ]


def test_a_folder_that_holds_images_and_annotations(write_folder, png, jpeg, tmp_path: Path):
    files = {"images/a.b.jpg": jpeg, "annotations/a.b.png": png(np.ones((64, 64), np.uint8))}
    root = write_folder(tmp_path / "data", files | {"annotations/unused.png": png(np.ones((64, 64), np.uint8))})
    (pair,) = masked_images(root, DEFAULT, "seg.png")
    assert (pair.image.key, pair.mask.path.name) == ("a.b", "a.b.png")


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_of_each_class_are_counted(tmp_path: Path, workers: int):
    write_drawings(tmp_path, 3, seed=6, masks=True)
    advanced: list[int] = []
    counts = check_masks(masked_images(tmp_path, DEFAULT, "seg.png"), MaskRule((2,)), workers, advanced.append).pixels
    masks = np.stack([np.asarray(draw(index, 6).mask) for index in range(3)])
    assert counts[:4].tolist() == [(masks == 0).sum(), (masks == 1).sum(), 0, (masks == 3).sum()]
    assert counts[4:].sum() == 0
    assert sum(advanced) == 3


def test_an_image_of_another_size_than_its_mask_is_named(write_folder, png, jpeg, tmp_path: Path):
    files = {"images/a.jpg": jpeg, "annotations/a.png": png(np.ones((64, 60), np.uint8))}
    pairs = masked_images(write_folder(tmp_path, files), DEFAULT, "seg.png")
    with pytest.raises(DataError, match="the mask of 'a' has 60x64 pixels, and its image, upright, 64x64"):
        check_masks(pairs, MaskRule(), 0, lambda count: None)
