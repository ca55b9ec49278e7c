"""segment: figures of frozen features on drawings, with their protocol and page."""

import json
from pathlib import Path

import numpy as np
import pytest
from mapet.quickstart.drawings import CLASSES, write_drawings
from mapet.shared.errors import DataError, UsageError
from mapet.train_stage.segment import segment

WEIGHTS = Path(__file__).parent / "oracle" / "pretrain.pth.tar"


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Training images, validation images, and the names of their classes."""
    root = tmp_path_factory.mktemp("drawings")
    write_drawings(root / "train", 16, seed=1, masks=True)
    write_drawings(root / "val", 6, seed=2, masks=True)
    (root / "classes.txt").write_text("\n".join(["background", *CLASSES]))
    return root / "train", root / "val", root / "classes.txt"


def test_classifiers_of_both_encoders_are_measured(drawings, tmp_path: Path):
    train, val, classes = drawings
    rows = segment(WEIGHTS, train, val, classes=classes, random_init=True, max_patches=100, html=tmp_path / "page.html")
    found = [(row.features, row.classifier) for row in rows]
    names = ("logistic regression", "k-NN")
    assert found == [(features, name) for features in ("pre-trained", "random init") for name in names]
    for row in rows:
        assert list(row.iou) == ["background", *CLASSES]
        known = {name: value for name, value in row.iou.items() if value is not None}
        assert list(known) == ["background", *CLASSES[:6]]  # the six validation images have one object each
        assert row.mean_iou == pytest.approx(np.mean(list(known.values())))
        assert 0 < row.pixel_accuracy <= 1
        assert (row.protocol["train_images"], row.protocol["val_images"], row.protocol["ignored"]) == (16, 6, [255])
        assert row.protocol["train_patches"] <= 100
        json.dumps(row.to_json(), allow_nan=False)
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="segmentation"') == 6
    assert segment(WEIGHTS, train, val, classes=classes, max_patches=100)[0] == rows[0]


def test_a_linear_head_learns(drawings, tmp_path: Path):
    train, val, classes = drawings
    options = {"classes": classes, "head": "linear", "iteration_batch": 4, "html": tmp_path / "page.html"}
    row = segment(WEIGHTS, train, val, iterations=30, **options)[0]
    untrained = segment(WEIGHTS, train, val, iterations=1, **options)[0]
    assert row.classifier == "linear head"
    assert row.mean_iou > untrained.mean_iou
    assert (row.protocol["iterations"], row.protocol["batch"]) == (30, 4)
    assert segment(WEIGHTS, train, val, iterations=30, **options)[0] == row


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "unet"}, "--head unet is unknown"),
        ({"max_patches": 15}, "fewer than the 16 training images"),
        ({"image_size": 50}, "not a multiple"),
        ({"ignore": (-1,)}, "--ignore -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(drawings, options: dict, words: str):
    train, val, _ = drawings
    with pytest.raises(UsageError, match=words):
        segment(WEIGHTS, train, val, **options)


def test_a_page_needs_a_file(drawings, tmp_path: Path):
    train, val, _ = drawings
    with pytest.raises(UsageError, match="is a folder"):
        segment(WEIGHTS, train, val, html=tmp_path)


def test_masks_of_other_classes_are_refused(drawings, tmp_path: Path):
    _, val, _ = drawings
    with pytest.raises(DataError, match="No class of the validation masks"):
        segment(WEIGHTS, of_class_99(tmp_path), val, ignore=(0, 255))


def of_class_99(folder: Path) -> Path:
    """Black images whose masks hold class 99 only."""
    from PIL import Image

    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16)).save(folder / "images" / f"{number}.jpg")
        Image.new("L", (16, 16), 99).save(folder / "annotations" / f"{number}.png")
    return folder


def test_the_page_opens_and_fades_its_overlays(drawings, open_page, tmp_path: Path):
    train, val, classes = drawings
    segment(WEIGHTS, train, val, classes=classes, head="linear", iterations=1, html=tmp_path / "page.html")
    page = open_page(tmp_path / "page.html").page
    assert page.locator(".segmentation").count() == 6
    assert page.locator(".segmentation img").count() == 12  # true and predicted
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 64)")
    assert page.locator("#by-class tbody tr").count() == 7
    overlay = page.locator(".overlay").first
    page.locator("#opacity").fill("0")
    assert overlay.evaluate("(image) => getComputedStyle(image).opacity") == "0"
