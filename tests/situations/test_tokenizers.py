"""Situations of visual tokenizers: the control without a teacher, published tokenizers, and their files."""

import json
from pathlib import Path

import pytest

CONTROL = ("--tower", "pixels:8", "--image-size", 64, "--k", 16, "--restarts", 1, "--iterations", 3)


@pytest.fixture(scope="module")
def pixel_codebook(mapet, chain, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pixels") / "codebook"
    mapet("tokenize", "build-codebook", chain.images, *CONTROL, "--out", out).ok()
    return out


def test_pixel_clusters_from_codebook_to_verified_store(mapet, chain, pixel_codebook, tmp_path):
    """Clusters of raw pixels as the control without a teacher."""
    tokens = tmp_path / "tokens"
    mapet("tokenize", "encode-shards", chain.images, "--codebook", pixel_codebook, "--out", tokens).ok()
    options = ("--codebook", pixel_codebook, "--images", chain.images, "--reencode", 5)
    assert "0 differ" in mapet("tokenize", "verify", tokens, *options).ok().text
    described = json.loads((tokens / "codebook.json").read_text())
    assert (described["tower"], described["grid"], described["dim"]) == ("pixels:8", [8, 8], 192)
    mapet("tokenize", "inspect", tokens).ok()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--pretrained", "openai"), ("--pretrained openai", "no weights")),
        (("--layer", 3), ("--layer", "no layers")),
        (("--image-size", 60), ("--image-size 60", "multiple of the 8 pixels")),
        (("--tower", "pixels:x"), ("pixels:x", "patch size")),
        (("--tower", "pixels:0"), ("pixels:0", "patch size")),
    ],
    ids=["pretrained", "layer", "size", "word", "zero"],
)
def test_pixel_tower_with_an_option_that_it_does_not_have(mapet, chain, tmp_path, options, parts):
    """Pixel clusters with an option of a network."""
    words = [*CONTROL, *options]
    mapet("tokenize", "build-codebook", chain.images, *words, "--out", tmp_path / "out").refused(2, *parts)
    assert not (tmp_path / "out").exists()
