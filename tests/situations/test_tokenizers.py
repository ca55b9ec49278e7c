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


@pytest.mark.parametrize("kind", ["vqkd", "dvae"])
def test_published_tokenizer_from_import_to_verified_store(mapet, chain, vqkd_file, dvae_files, tmp_path, kind):
    """A published tokenizer is imported, encodes, is verified and inspected like any other."""
    book, tokens = tmp_path / "codebook", tmp_path / "tokens"
    file = ("--vqkd", vqkd_file) if kind == "vqkd" else ("--dvae", dvae_files["zip"], "--image-size", 32)
    mapet("tokenize", "import", *file, "--out", book).ok()
    assert "nothing to do" in mapet("tokenize", "import", *file, "--out", book).ok().text
    mapet("tokenize", "verify", book).ok()
    mapet("tokenize", "inspect", book).ok()
    views = ("--crop", "random-resized", "--views", 2)
    mapet("tokenize", "encode-shards", chain.images, "--codebook", book, "--out", tokens, *views).ok()
    options = ("--codebook", book, "--images", chain.images, "--reencode", 5)
    assert "0 differ" in mapet("tokenize", "verify", tokens, *options).ok().text
    page = tmp_path / "page.html"
    mapet("tokenize", "inspect", tokens, "--html", page, "--images", chain.images, "--codebook", book).ok()
    assert json.loads((tokens / "codebook.json").read_text())["tower"] == kind
    (book / "encoder.safetensors").write_bytes(b"damaged")
    mapet("tokenize", "verify", book).refused(1, "encoder.safetensors", "changed")
    more = ("--crop", "random-resized", "--views", 3)
    mapet("tokenize", "encode-shards", chain.images, "--codebook", book, "--out", tokens, *more).refused(1, "encoder")


@pytest.mark.parametrize(
    ("options", "code", "parts"),
    [
        (("--vqkd", "{dvae}"), 1, ("a dvae tokenizer", "--dvae")),
        (("--dvae", "{vqkd}"), 1, ("a vqkd tokenizer", "--vqkd")),
        (("--vqkd", "{missing}"), 1, ("does not exist",)),
        (("--vqkd", "{vqkd}", "--dvae", "{dvae}"), 2, ("--vqkd and --dvae", "one thing at a time")),
        (("--vqkd", "{vqkd}", "--centroids", "x.npy"), 2, ("--centroids and --vqkd",)),
        (("--vqkd", "{vqkd}", "--image-size", "224"), 1, ("images of 224 pixels", "its own size is 64")),
        (("--dvae", "{dvae}", "--image-size", "33"), 1, ("33 pixels", "multiple of 2")),
    ],
    ids=["dvae as vqkd", "vqkd as dvae", "missing", "two", "centroids", "size of vqkd", "size of dvae"],
)
def test_wrong_published_file(mapet, vqkd_file, dvae_files, tmp_path, options, code, parts):
    """The file of a published tokenizer is another one, or is given with options that do not fit."""
    places = {"vqkd": vqkd_file, "dvae": dvae_files["legacy"], "missing": tmp_path / "missing"}
    words = [word.format(**places) for word in options]
    mapet("tokenize", "import", *words, "--out", tmp_path / "out").refused(code, *parts)
    assert not (tmp_path / "out").exists()
