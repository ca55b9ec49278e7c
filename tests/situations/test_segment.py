"""Segmentation from the command line: images with masks as people have them, and what is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mapet.quickstart.drawings import write_drawings
from PIL import Image


def mask(values: np.ndarray | int, mode: str = "L", width: int = 64) -> bytes:
    """A PNG of 64 rows, whose left half is class 0 and whose right half is `values`."""
    array = np.zeros((64, width), np.uint8)
    array[:, width // 2 :] = values
    file = io.BytesIO()
    Image.fromarray(array).convert(mode).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def data(write_folder, picture, tmp_path: Path) -> Callable[..., Path]:
    """data({name of an annotation: bytes}): a data set of two images, of which some masks are changed or (None) left
    out."""

    def write(changed: dict[str, bytes | None]) -> Path:
        masks: dict[str, bytes | None] = {"a.png": mask(1), "b.png": mask(2)} | changed
        files = {f"images/{name}.jpg": picture(at) for at, name in enumerate("ab")}
        files |= {f"annotations/{name}": content for name, content in masks.items() if content is not None}
        return write_folder(tmp_path / "data", files)

    return write


@pytest.fixture
def segment(mapet, lab) -> Callable[..., object]:
    """segment(images, *options): the same images train and validate."""
    return lambda images, *options: mapet("train", "segment", lab.run, "--images", images, "--val", images, *options)


def test_masks_in_tars(segment, tmp_path: Path):
    """Tars with KEY.jpg and KEY.seg.png give a table of mean IoU, pixel accuracy and IoU by class."""
    write_drawings(tmp_path / "tars", 6, seed=3, masks=True)
    outcome = segment(tmp_path / "tars").ok()
    assert "mean IoU" in outcome.stdout
    assert "IoU by class" in outcome.stdout


def test_json_and_page(segment, data, tmp_path: Path):
    """--json prints figures and protocol, --html writes the page, --classes names the classes on both."""
    (tmp_path / "names.txt").write_text("other\n<b>sky</b>\nsea\n")
    options = ("--classes", tmp_path / "names.txt", "--ignore", 0, "--ignore", 255, "--html", tmp_path / "page.html")
    outcome = segment(data({}), "--json", *options).ok()
    rows = json.loads(outcome.stdout)["rows"]
    assert [row["classifier"] for row in rows] == ["logistic regression", "k-NN"]
    assert rows[0]["iou"]["other"] is None  # ignored
    assert rows[0]["protocol"]["ignored"] == [0, 255]
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;sky&lt;/b&gt;" in page
    assert "<b>sky" not in page


def test_linear_head(segment, data):
    """--head linear trains and measures a linear head."""
    outcome = segment(data({}), "--head", "linear", "--iterations", 2, "--iteration-batch", 2).ok()
    assert "linear head" in outcome.stdout


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"b.png": None}, ("b.jpg has no mask", "annotations/b.png")),
        ({"b.png": mask(2, width=32)}, ("the mask of 'b' has 32x64 pixels", "64x64")),
        ({"b.png": mask(2, "RGB")}, ("the mask of 'b' is a PNG of mode RGB", "one channel")),
        ({"b.png": b"text"}, ("the mask of 'b' is not an image",)),
        ({"b.png": mask(2)[:60]}, ("the mask of 'b' cannot be decoded",)),
    ],
)
def test_masks_that_do_not_fit(segment, data, changed: dict, parts: tuple[str, ...]):
    """A missing mask, one of another size, one in colours and one that is damaged are refused by name."""
    segment(data(changed)).refused(1, *parts)


def test_only_ignored_pixels(segment, data):
    """A mask with only ignored pixels is refused by name."""
    only = np.full((64, 64), 255, np.uint8)
    file = io.BytesIO()
    Image.fromarray(only).save(file, "PNG")
    segment(data({"b.png": file.getvalue()})).refused(1, "the mask of 'b' has only ignored pixels (255)")


def test_a_class_beyond_the_list(segment, data, tmp_path: Path):
    """A class index without a line in --classes is refused by name."""
    (tmp_path / "names.txt").write_text("other\nsky\n")
    segment(data({}), "--classes", tmp_path / "names.txt").refused(1, "the mask of 'b' has class index 2", "0 to 1")


def test_a_tar_without_a_mask(segment, write_tar, picture, tmp_path: Path):
    """An image in a tar without a mask is refused by name."""
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": picture(), "a.seg.png": mask(1), "b.jpg": picture(1)})
    segment(tar).refused(1, "a.tar holds 'b.jpg' and nothing of --mask-field seg.png under the key 'b'")


def test_a_mask_without_an_image(segment, write_tar, picture, tmp_path: Path):
    """A mask in a tar without an image is refused by name."""
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": picture(), "a.seg.png": mask(1), "b.seg.png": mask(1)})
    segment(tar).refused(1, "a.tar holds 'b.seg.png' and nothing of an image format under the key 'b'")


def test_another_mask_field(segment, write_tar, picture, tmp_path: Path):
    """--mask-field says how masks are called in tars."""
    files = {f"{key}.{field}": data for key in "ab" for field, data in (("jpg", picture()), ("label.png", mask(1)))}
    segment(write_tar(tmp_path / "a.tar", files), "--mask-field", "label.png").ok()


def test_a_folder_without_masks(segment, write_folder, picture, tmp_path: Path):
    """A folder of images that is not beside a folder of masks is refused."""
    root = write_folder(tmp_path / "photos", {"a.jpg": picture(), "b.jpg": picture(1)})
    segment(root).refused(2, "photos has no masks", "annotations/")


def test_one_image(segment, write_tar, picture, tmp_path: Path):
    """A single training image is refused, as a tenth is held out."""
    tar = write_tar(tmp_path / "a.tar", {"a.jpg": picture(), "a.seg.png": mask(1)})
    segment(tar).refused(2, "two or more")


def test_a_dry_run_of_upernet(segment, data, tmp_path: Path):
    """--dry-run estimates a run of UPerNet and writes nothing; frozen encoders have no run to estimate."""
    options = ("--set", "train.batch_size=2", "--set", "model.channels=16", "--out", tmp_path / "run", "--dry-run")
    outcome = segment(data({}), "--head", "upernet", *options).ok()
    assert "crops" in outcome.stdout
    assert "a step" in outcome.stdout
    estimate = json.loads(segment(data({}), "--head", "upernet", *options, "--json").ok().stdout)
    assert (estimate["batch_size"], estimate["plan"]["images"]) == (2, 2)
    assert estimate["steps"]["mean"] > 0
    assert not (tmp_path / "run").exists()
    segment(data({}), "--dry-run").refused(2, "--dry-run estimates a run; add --head upernet")
