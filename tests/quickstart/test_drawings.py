"""The drawings are repeatable, cover their classes without giving them away, and survive the tars."""

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from mapet.quickstart.drawings import CLASSES, COLOURS, draw, write_drawings
from PIL import Image


def pixels(index: int, seed: int, size: int = 64) -> np.ndarray:
    return np.asarray(draw(index, seed, size).image)


def read(paths: list[Path]) -> list[dict]:
    urls = [str(path) for path in paths]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))


def test_same_seed_and_index_give_the_same_drawing():
    first, second = draw(12, 3), draw(12, 3)
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert (first.label, first.caption, first.key) == (second.label, second.caption, second.key)


@pytest.mark.parametrize("other", [(13, 3), (12, 4), (12 + len(CLASSES), 3), (3, 12)])
def test_another_seed_or_index_gives_another_drawing(other: tuple[int, int]):
    assert not np.array_equal(pixels(12, 3), pixels(*other))
    assert draw(12, 3).key != draw(*other).key


@pytest.mark.parametrize("size", [16, 64, 96])
def test_size_is_the_side_in_pixels(size: int):
    image = draw(5, 0, size).image
    assert image.mode == "RGB"
    assert image.size == (size, size)


@pytest.mark.parametrize("arguments", [(-1, 0), (0, -1), (0, 0, 8)])
def test_impossible_arguments_are_refused(arguments: tuple[int, ...]):
    with pytest.raises(ValueError, match="must be at least"):
        draw(*arguments)


def test_labels_cover_all_classes_and_captions_name_them():
    drawings = [draw(index, 1) for index in range(4 * len(CLASSES))]
    assert {drawing.label for drawing in drawings} == set(range(len(CLASSES)))
    assert all(CLASSES[drawing.label] in re.findall(r"\w+", drawing.caption) for drawing in drawings)
    # Colours must show up too, or the captions would teach nothing but the class.
    assert sum(any(colour in drawing.caption for colour in COLOURS) for drawing in drawings) > len(drawings) / 4


def test_mean_colour_does_not_give_the_class():
    drawings = [draw(index, 2) for index in range(800)]
    labels = np.array([drawing.label for drawing in drawings])
    colours = np.stack([np.asarray(drawing.image).mean(axis=(0, 1)) for drawing in drawings])
    means = np.stack([colours[:400][labels[:400] == label].mean(axis=0) for label in range(len(CLASSES))])
    nearest = np.linalg.norm(colours[400:, None] - means[None], axis=2).argmin(axis=1)
    assert (nearest == labels[400:]).mean() < 2 / len(CLASSES)


def test_tars_hold_the_drawings(tmp_path: Path):
    paths = write_drawings(tmp_path / "new", count=25, seed=6, per_tar=10, prefix="val")
    assert [path.name for path in paths] == ["val-000000.tar", "val-000001.tar", "val-000002.tar"]
    assert sorted((tmp_path / "new").iterdir()) == paths, "a temporary file was left behind"
    samples = read(paths)
    assert len(samples) == 25
    for index, sample in enumerate(samples):
        expected = draw(index, 6)
        assert (sample["__key__"], sample["cls"], sample["txt"]) == (
            expected.key,
            expected.label,
            expected.caption,
        )
        # JPEG loses a little of the noise and of the colours' sharpness, never the picture.
        assert np.abs(np.asarray(sample["jpg"]) - np.asarray(expected.image, np.float32)).mean() < 12


def test_keys_are_unique_over_seeds(tmp_path: Path):
    samples = read([write_drawings(tmp_path, 20, seed, prefix=f"s{seed}")[0] for seed in (0, 1, 10, 1000)])
    assert len({sample["__key__"] for sample in samples}) == 80


def test_rewriting_replaces_and_gives_the_same_bytes(tmp_path: Path):
    before = write_drawings(tmp_path, 5, seed=0)[0].read_bytes()
    assert write_drawings(tmp_path, 5, seed=0)[0].read_bytes() == before


@pytest.mark.parametrize(("count", "per_tar"), [(0, 10), (10, 0)])
def test_empty_tars_are_refused(tmp_path: Path, count: int, per_tar: int):
    with pytest.raises(ValueError, match="at least 1"):
        write_drawings(tmp_path, count, seed=0, per_tar=per_tar)


def test_masks_cover_the_object_with_its_class():
    for index in range(2 * len(CLASSES)):
        drawing, plain = draw(index, 4), pixels(index, 4).astype(int)
        mask = np.asarray(drawing.mask)
        assert mask.shape == plain.shape[:2]
        assert set(np.unique(mask)) == {0, drawing.label + 1}
        # The object is darker than its backdrop.
        assert plain[mask > 0].mean() < plain[mask == 0].mean()


def test_tars_hold_masks_if_asked_for(tmp_path: Path):
    without = write_drawings(tmp_path / "without", 4, seed=5)
    paths = write_drawings(tmp_path / "with", 4, seed=5, masks=True)
    for sample, plain in zip(read(paths), read(without), strict=True):
        assert "seg.png" not in plain
        assert np.array_equal(sample["jpg"], plain["jpg"])
        assert (sample["__key__"], sample["cls"]) == (plain["__key__"], plain["cls"])
    with tarfile.open(paths[0]) as tar:
        masks = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".seg.png")]
    assert len(masks) == 4
    for index, data in enumerate(masks):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(draw(index, 5).mask))
