"""Situations of text, files and services that somebody else made: names, servers, limits of the machine."""

import os
from pathlib import Path

import pytest

HOSTILE_NAMES = {
    "markup": "[/x][red]",
    "escape": "\x1b[31m\x1b]0;title\x07",
    "newline": "a\nmapet: all is well",
    "bidi": "\u202egnp.\u2066",
    "emoji": ":cat: :warning:",
    "undecodable": os.fsdecode(b"caf\xe9"),
}


def safe(text: str) -> bool:
    """Whether nothing in the text could control a terminal or hide."""
    return not set("\x1b\x07\x9b\u202e\u2066\r") & set(text) and "\nmapet: all is well" not in text


@pytest.fixture(scope="module", params=HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def place(request, tmp_path_factory) -> Path:
    """A folder with a hostile name."""
    return tmp_path_factory.mktemp("foreign") / request.param


@pytest.fixture(scope="module")
def pictures(place, picture) -> Path:
    """Two class folders of 20 pictures whose names are as hostile as the folder's."""
    # A key must be UTF-8; a folder above the images need not.
    name = "" if "\udce9" in place.name else place.name
    for number in range(20):
        folder = place / "images" / f"{'ab'[number % 2]}{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}-{name.replace('.', '')}.jpg").write_bytes(picture(number))
    return place / "images"


def assert_safe(outcome):
    outcome.ok()
    assert safe(outcome.text), outcome.text
    return outcome


def test_hostile_names(mapet, lab, place, pictures):
    """Folders, files and classes whose names hold markup, escape sequences, line breaks, marks of direction."""
    options = ["--tower", lab.tower, "--k", 8, "--restarts", 1, "--iterations", 2]
    codebook, tokens, run = place / "codebook", place / "tokens", place / "run"
    assert_safe(mapet("tokenize", "build-codebook", pictures, *options, "--out", codebook))
    assert_safe(mapet("tokenize", "encode-shards", pictures, "--codebook", codebook, "--out", tokens))
    assert_safe(mapet("tokenize", "verify", tokens))
    page = ["--html", place / "page.html", "--images", pictures]
    shown = assert_safe(mapet("tokenize", "inspect", tokens, "--against", tokens, *page))
    if "cat" in place.name:
        assert ":cat:" in shown.stdout.replace("\n", "")
    assert safe((place / "page.html").read_text())
    settings = ["--images", pictures, "--tokens", tokens, "--out", run, *lab.settings]
    assert_safe(mapet("train", "pretrain", *settings))
    assert_safe(mapet("train", "report", run, "--images", pictures, "--tokens", tokens))
    assert safe((run / "report.html").read_text())
    assert_safe(mapet("train", "import", run, "--out", place / "weights"))
    assert_safe(mapet("train", "export", place / "weights", "--out", place / "export"))
    assert_safe(mapet("train", "features", pictures, "--weights", run, "--out", place / "features.zarr"))
    assert_safe(mapet("train", "probe", run, "--images", pictures, "--val", pictures))
