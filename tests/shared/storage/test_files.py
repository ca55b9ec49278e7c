"""Atomic writes, and sealed JSON that detects any change."""

import errno
import json
import os
import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import DataError
from mapet.shared.storage.files import canonical_json, read_sealed_json, sha256_file, write_sealed_json, written_whole
from mapet.shared.tokens.codebook import TOKEN_FIELDS, Codebook

CONTENT = {
    "format": "some-format",
    "version": 3,
    "number": 1999,
    "share": 0.25,
    "name": "größer",
    "control": "\x1f\n",
    "nested": {"list": [1, 2, {"deep": None}], "flag": True},
}


def read(path: Path) -> dict:
    return read_sealed_json(path, format="some-format", version=3)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "x.json"
    write_sealed_json(path, CONTENT)
    return path


def test_sealed_json_is_read_back(sealed: Path):
    assert read(sealed) == CONTENT
    assert json.loads(sealed.read_text(encoding="utf-8"))["name"] == "größer"


def test_equal_content_gives_equal_bytes_whatever_its_order(sealed: Path, tmp_path: Path):
    write_sealed_json(tmp_path / "y.json", dict(reversed(CONTENT.items())))
    assert (tmp_path / "y.json").read_bytes() == sealed.read_bytes()


def expect_refusal(sealed: Path, data: bytes) -> None:
    changed = sealed.with_name("changed.json")
    changed.write_bytes(data)
    with pytest.raises(DataError, match=r"changed\.json"):
        read(changed)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_changed_byte_is_a_data_error(sealed: Path, data: st.DataObject):
    good = sealed.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != good[at]))
    expect_refusal(sealed, good[:at] + bytes([value]) + good[at + 1 :])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_missing_or_added_byte_is_a_data_error(sealed: Path, data: st.DataObject):
    good = sealed.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    added = data.draw(st.sampled_from([b"", b" ", b"\n", b"\r", b"0", b"-"]))
    if not added:
        expect_refusal(sealed, good[:at] + good[at + 1 :])
    elif good[:at] + added + good[at:] != good:
        expect_refusal(sealed, good[:at] + added + good[at:])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"1999", b"1e999"),  # infinity once parsed
        (b"1999", b"NaN"),
        (b"\\u001f", b"\\ud81f"),  # a lone surrogate
        (b"\n", b"\r\n"),
        (b"\n ", b"\n  "),
        (b"0.25", b"0.250"),
        ("größer".encode(), b"gr\\u00f6\\u00dfer"),
        (b"{\n", b'{\n "number": 1999,\n'),
    ],
)
def test_other_spellings_of_json_are_data_errors_too(sealed: Path, old: bytes, new: bytes):
    good = sealed.read_bytes()
    assert old in good
    expect_refusal(sealed, good.replace(old, new, 1))


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff\xfe"])
def test_a_file_that_is_not_a_json_object_is_a_data_error(sealed: Path, data: bytes):
    expect_refusal(sealed, data)


def test_missing_file_other_format_and_other_version_are_named(sealed: Path):
    with pytest.raises(DataError, match=r"nowhere\.json does not exist"):
        read(sealed.with_name("nowhere.json"))
    with pytest.raises(DataError, match=r"x\.json is not a other.*'some-format'"):
        read_sealed_json(sealed, format="other", version=3)
    with pytest.raises(DataError, match=r"x\.json has some-format version 3, and this mapet reads version 4"):
        read_sealed_json(sealed, format="some-format", version=4)


def test_nan_is_never_written(tmp_path: Path):
    with pytest.raises(ValueError, match="Out of range"):
        write_sealed_json(tmp_path / "x.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_canonical_json_has_one_spelling():
    assert canonical_json({"b": [1, 0.5], "a": "ö"}) == '{"a":"ö","b":[1,0.5]}'


def test_a_file_appears_only_when_the_block_ends(tmp_path: Path):
    final = tmp_path / "deep" / "file.bin"
    with written_whole(final) as partial:
        partial.write_bytes(b"half")
        assert not final.exists()
        assert partial.parent == final.parent
        assert partial.name.startswith(".")
    assert final.read_bytes() == b"half"
    assert os.listdir(final.parent) == ["file.bin"]


def test_a_folder_appears_only_when_the_block_ends(tmp_path: Path):
    with written_whole(tmp_path / "folder") as partial:
        (partial / "in").mkdir(parents=True)
        (partial / "in" / "a").write_text("a")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder/in/a").read_text() == "a"
    assert os.listdir(tmp_path) == ["folder"]


def fail_inside(path: Path, folder: bool, error: type) -> None:
    with written_whole(path) as partial:
        if folder:
            partial.mkdir()
        (partial / "a" if folder else partial).write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("folder", [False, True])
def test_after_a_failure_the_old_file_stays_and_nothing_is_left(tmp_path: Path, folder: bool, error: type):
    (tmp_path / "old").write_text("old")
    with pytest.raises(error):
        fail_inside(tmp_path / "old", folder, error)
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_nothing_is_left_when_the_final_name_cannot_be_taken(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").touch()
    with pytest.raises(DataError, match=r"taken could not be written \(.*\); choose another place and give"):
        write_text(tmp_path / "taken", "new")
    assert os.listdir(tmp_path) == ["taken"]


def write_text(path: Path, text: str) -> None:
    with written_whole(path) as partial:
        partial.write_text(text)


def test_an_impossible_path_is_a_data_error_that_names_it(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/below/x could not be written \(Not a directory\)"):
        write_text(tmp_path / "file" / "below" / "x", "new")


def test_an_error_about_another_file_is_not_changed(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"), written_whole(tmp_path / "x"):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(BrokenPipeError), written_whole(tmp_path / "x"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert not list(tmp_path.iterdir())


WRITERS = {
    "file": lambda out: write_text(out, "x" * 200_000),
    "json": lambda out: write_sealed_json(out, {"format": "x", "version": 1, "text": "x" * 200_000}),
    "codebook": lambda out: Codebook(np.zeros((100, 500), np.float32), np.zeros(100, np.int64), fields()).save(out),
}


def fields() -> dict:
    return dict.fromkeys(TOKEN_FIELDS, 0)


def expect_full(out: Path, write, words: str) -> None:
    """Writing `out` raises one sentence that names it; existing files stay, and nothing partial is left."""
    before = os.listdir(out.parent)
    with pytest.raises(DataError) as caught:
        write(out)
    assert str(caught.value) == f"{out} could not be written ({words}); make room and give the same command again."
    assert os.listdir(out.parent) == before


@pytest.mark.parametrize("kind", ["file", "json"])
def test_a_file_over_the_limit_is_a_data_error_and_leaves_nothing(tmp_path: Path, kind: str):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        expect_full(tmp_path / "out", WRITERS[kind], "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    WRITERS[kind](tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of about 100,000 bytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=98304", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_a_data_error_and_leaves_nothing(small_disk: Path, kind: str):
    expect_full(small_disk / "out", WRITERS[kind], "No space left on device")


@pytest.mark.parametrize("folder", [False, True])
def test_files_of_a_killed_process_are_overwritten(tmp_path: Path, folder: bool):
    with written_whole(tmp_path / "x") as partial:
        partial.touch()
    if folder:
        partial.mkdir()
        (partial / "junk").touch()
    else:
        partial.write_text("junk")
    with written_whole(tmp_path / "x") as again:
        assert again == partial
        assert not again.exists()
        again.write_text("good")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "good"


def test_sha256_of_a_file(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == expected
