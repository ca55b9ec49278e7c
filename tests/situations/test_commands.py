"""Situations that concern every command."""

import pytest

COMMANDS = {
    "build-codebook": ("tokenize", "build-codebook", "{missing}", "--out", "{out}"),
    "encode-shards": ("tokenize", "encode-shards", "{missing}", "--codebook", "{missing}", "--out", "{out}"),
    "inspect": ("tokenize", "inspect", "{missing}"),
    "verify": ("tokenize", "verify", "{missing}"),
    "pretrain": ("train", "pretrain", "--images", "{missing}", "--tokens", "{missing}", "--out", "{out}"),
    "probe": ("train", "probe", "{missing}", "--images", "{missing}", "--val", "{missing}"),
    "export": ("train", "export", "{missing}", "--out", "{out}"),
    "import": ("train", "import", "{missing}", "--out", "{out}"),
    "report": ("train", "report", "{missing}"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_missing_input(mapet, tmp_path, words):
    """The input does not exist."""
    places = {"missing": tmp_path / "missing", "out": tmp_path / "out"}
    mapet(*(word.format(**places) for word in words)).refused(1, str(tmp_path / "missing"))
    assert not (tmp_path / "out").exists()
