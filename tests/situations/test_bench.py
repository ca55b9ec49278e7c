"""Situations around `mapet bench`."""

import json

TINY = [
    "model.name=null",
    "model.dim=32",
    "model.depth=1",
    "model.heads=2",
    "model.image_size=32",
    "model.patch_size=8",
]
QUICK = ["--seconds", 0.01, "--batch-size", 2, "--k", 16, "--device", "cpu"]
QUICK += [word for setting in TINY for word in ("--set", setting)]


def test_a_machine_is_measured_on_ones_own_pictures(mapet, lab):
    """`mapet bench --images TARS --json` prints nothing but JSON: rates, ratios, and what bounds a run."""
    outcome = mapet("bench", "--images", lab.images, "--json", *QUICK).ok()
    found = json.loads(outcome.stdout)
    assert found["bounds"]["training"] in ("step", "loader")
    assert found["verdict"][0].startswith("Training here is bound by the ")


def test_images_that_are_not_there(mapet, tmp_path):
    """`--images` names a folder that does not exist."""
    mapet("bench", "--images", tmp_path / "none", *QUICK).refused(1, "none")


def test_a_folder_without_images(mapet, tmp_path):
    """`--images` names an empty folder."""
    mapet("bench", "--images", tmp_path, *QUICK).refused(1, str(tmp_path))


def test_a_picture_that_cannot_be_decoded(mapet, tmp_path):
    """`--images` holds a file that is no image."""
    (tmp_path / "one.jpg").write_bytes(b"no image")
    mapet("bench", "--images", tmp_path, *QUICK).refused(1, "one.jpg", "not an image")


def test_a_tower_that_is_unknown(mapet, lab):
    """`--tower` is no model of open_clip."""
    mapet("bench", "--images", lab.images, "--tower", "ViT-Z-99", *QUICK).refused(2, "ViT-Z-99")


def test_no_time_to_measure(mapet):
    """`--seconds 0` is refused before anything is prepared."""
    mapet("bench", "--seconds", 0).refused(2, "--seconds 0 must be a positive number")


def test_a_batch_size_given_as_a_setting(mapet):
    """`--set train.batch_size` would be overridden by `--batch-size`; the sentence says which option to give."""
    mapet("bench", "--set", "train.batch_size=4").refused(2, "--set train.batch_size", "give --batch-size")
