"""Situations of quality without training: what inspect measures of a store, with and without its images."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def pixel_store(mapet, lab, tmp_path_factory) -> tuple[Path, Path]:
    """Codebook and store of pixel clusters with K = 9 in a 4x4 grid, of the lab's images."""
    root = tmp_path_factory.mktemp("pixels")
    control = ("--tower", "pixels:16", "--image-size", 64, "--k", 9, "--restarts", 1, "--iterations", 2)
    mapet("tokenize", "build-codebook", lab.images, *control, "--out", root / "book").ok()
    mapet("tokenize", "encode-shards", lab.images, "--codebook", root / "book", "--out", root / "tokens").ok()
    return root / "book", root / "tokens"


def quality(outcome) -> dict:
    return json.loads(outcome.ok().stdout)["quality"]


def test_figures_of_a_store_alone(mapet, lab):
    """A store without its images: purity and bigrams, no stability."""
    found = quality(mapet("tokenize", "inspect", lab.tokens, "--json"))
    assert found["pictures"] is None
    assert 0 < found["labels"]["purity"]["chance"] <= 1
    shown = mapet("tokenize", "inspect", lab.tokens).ok().stdout
    assert "purity" in shown
    assert "stable if mirrored" not in shown


def test_figures_with_images_and_codebook(mapet, lab):
    """The same with images and codebook: stability and reconstruction, without a page."""
    options = ("--images", lab.images, "--codebook", lab.codebook)
    shown = mapet("tokenize", "inspect", lab.tokens, *options, "--quality-images", 6).ok().stdout
    for name in ("stable if mirrored", "stable if shifted", "stable if enlarged", "reconstruction error"):
        assert name in shown
    without = mapet("tokenize", "inspect", lab.tokens, *options, "--quality-images", 0, "--json")
    assert quality(without)["pictures"] is None


def test_figures_of_a_store_that_holds_its_images(mapet, lab, tmp_path):
    """A store of tars holds its images: --codebook alone is enough."""
    tokens = tmp_path / "tokens"
    options = ("--codebook", lab.codebook, "--out", tokens, "--format", "webdataset")
    mapet("tokenize", "encode-shards", lab.images, *options).ok()
    options = ("--codebook", lab.codebook, "--quality-images", 4, "--json")
    assert quality(mapet("tokenize", "inspect", tokens, *options))["pictures"]["images"] == 4


def test_two_tokenizers_side_by_side(mapet, lab, pixel_store):
    """k-CLIP against pixel clusters, of another K and grid."""
    book, tokens = pixel_store
    options = ("--images", lab.images, "--codebook", lab.codebook, "--against", tokens, "--against-codebook", book)
    shown = mapet("tokenize", "inspect", lab.tokens, *options, "--quality-images", 4).ok().stdout
    assert "9 of 9 used" in shown
    assert "codes tell each other" in shown
    assert shown.count("stable if mirrored") == 2


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (("--codebook", "{codebook}"), 2, ("--codebook needs the pictures", "give --images")),
        (("--images", "{images}"), 2, ("--images belongs to a page or to --codebook",)),
        (("--tower", "pixels"), 2, ("--tower belongs to a page or to --codebook",)),
        (("--against-codebook", "{codebook}"), 2, ("--against-codebook", "belongs to --against")),
        (("--against", "{other}", "--against-codebook", "{book}"), 2, ("--against-codebook needs the pictures",)),
        (
            ("--against", "{other}", "--against-codebook", "{codebook}", "--images", "{images}"),
            1,
            ("{other}", "was made with codebook"),
        ),
        (("--codebook", "{book}", "--images", "{images}"), 1, ("{tokens}", "was made with codebook")),
        (("--codebook", "{codebook}", "--images", "{images}", "--quality-images", "-1"), 2, ("--quality-images -1",)),
    ],
    ids=["no images", "no codebook", "tower", "no store", "no images there", "other there", "other", "negative"],
)
def test_options_of_quality_that_do_not_fit(mapet, lab, pixel_store, options, code, parts):
    """An option of quality without the one that it needs, or the codebook of another store."""
    book, other = pixel_store
    places = {"codebook": lab.codebook, "images": lab.images, "tokens": lab.tokens, "book": book, "other": other}
    words = [word.format(**places) for word in options]
    mapet("tokenize", "inspect", lab.tokens, *words).refused(code, *(part.format(**places) for part in parts))


def test_quality_options_for_a_codebook(mapet, lab):
    """Options of a store's quality, given with a codebook."""
    options = ("--images", lab.images, "--codebook", lab.codebook)
    mapet("tokenize", "inspect", lab.codebook, *options).refused(2, "--codebook belongs to a token store")
    options = ("--against", lab.codebook, "--against-codebook", lab.codebook)
    mapet("tokenize", "inspect", lab.codebook, *options).refused(2, "--against-codebook belongs to a token store")


def test_images_that_changed_since_they_were_encoded(mapet, lab, tmp_path):
    """The tar beside the store is another one of the same name."""
    images = Path(shutil.copytree(lab.images, tmp_path / "images"))
    first, second = sorted(images.glob("*.tar"))
    first.write_bytes(second.read_bytes())
    options = ("--images", images, "--codebook", lab.codebook)
    mapet("tokenize", "inspect", lab.tokens, *options).refused(1, str(first))
