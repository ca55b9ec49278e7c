"""The note of a failed transfer appears whole, and a waiting loader raises what it says."""

import os
from pathlib import Path

import pytest
from mapet.shared.errors import DataError
from mapet.train_stage.data.remote_tars import _write_failure_note, wait_for


def test_a_note_is_renamed_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tar, replace, seen = tmp_path / "a.tar", os.replace, []

    def watched(source: Path, target: Path) -> None:
        seen.append((target.exists(), source.read_text(encoding="utf-8")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    _write_failure_note(tar, "http://host/a.tar cannot be read (é).")
    assert seen == [(False, "http://host/a.tar cannot be read (é).")]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.failed"]
    with pytest.raises(DataError, match=r"cannot be read \(é\)"):
        wait_for(tar)
