"""Listings of tars are kept: they equal a fresh listing, and one is made when anything that they depend on changes."""

import os
from pathlib import Path

import pytest
from mapet.shared.sources.options import SourceOptions
from mapet.shared.sources.passed import PassedOver
from mapet.shared.sources.records import ImageRecord
from mapet.shared.sources.sources import open_source, with_labels

COUNT = 256


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of listings; a tar may be kept as soon as it was written."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mapet.shared.sources.listings._SETTLED_NS", -1)
    return tmp_path / "cache" / "mapet" / "listings"


@pytest.fixture
def tar(tmp_path: Path, write_tar) -> Path:
    return write_tar(tmp_path / "many.tar", members("a"))


def members(key: str, count: int = COUNT) -> dict[str, bytes]:
    found = {f"{key}{number:04d}.jpg": b"x" * number for number in range(count)}
    return {**found, **{f"{key}{number:04d}.cls": str(number % 3).encode() for number in range(count)}, "a.txt": b"?"}


def listed(tar: Path, options: SourceOptions | None = None) -> tuple[list[ImageRecord], str]:
    (shard,) = open_source(tar, options or SourceOptions())
    passed = PassedOver()
    return shard.index(passed=passed), str(passed)


def listed_without_reading(tar: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[ImageRecord], str]:
    with monkeypatch.context() as context:
        context.delattr("mapet.shared.sources.sources.index_tar")
        return listed(tar)


def test_the_second_listing_equals_the_first_and_reads_no_header(tar: Path, kept: Path, monkeypatch):
    first = listed(tar)
    assert len(first[0]) == COUNT
    assert first[0][5] == ImageRecord("a0005", tar, first[0][5].offset, 5, 2)
    assert first[1] == "1 .txt (a.txt)"
    assert len(list(kept.iterdir())) == 1
    assert listed_without_reading(tar, monkeypatch) == first


def test_a_tar_of_the_same_size_and_time_with_other_content_is_listed_anew(tar: Path, write_tar):
    before = tar.stat()
    listed(tar)
    write_tar(tar, members("b"))
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tar.stat().st_size == before.st_size
    assert listed(tar)[0][0].key == "b0000"


def test_other_options_and_other_class_names_are_other_listings(tar: Path):
    assert listed(tar)[0][1].label == 1
    prefixed = SourceOptions(key_prefix="tar")
    assert listed(tar, prefixed)[0][1].key == "many/a0001"
    (tar.parent / "classes.txt").write_text("ant\nbee\ncat\n")
    assert listed(tar)[0][1].label == "bee"
    (tar.parent / "classes.txt").write_text("ant\ncat\nbee\n")
    assert listed(tar)[0][1].label == "cat"
    labels = tar.parent / "labels.csv"
    labels.write_text("".join(f"a{number:04d}.jpg,dog\n" for number in range(COUNT)))
    assert with_labels(open_source(tar), labels, None)[0].index()[1].label == "dog"


def test_a_damaged_or_unwritable_folder_of_listings_costs_only_time(tar: Path, kept: Path, monkeypatch):
    first = listed(tar)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    for content in (b"", whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        file.write_bytes(content)
        assert listed(tar) == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(tar))  # no folder
    assert listed(tar) == first


def test_small_tars_faulty_ones_and_fresh_ones_are_not_kept(tmp_path: Path, kept: Path, write_tar, monkeypatch):
    listed(write_tar(tmp_path / "small.tar", members("a", COUNT - 1)))
    faulty = write_tar(tmp_path / "faulty.tar", members("a") | {"a0000.cls": b"\xff"})
    (shard,) = open_source(faulty)
    assert len(shard.index([], [])) == COUNT
    monkeypatch.setattr("mapet.shared.sources.listings._SETTLED_NS", 10**12)
    listed(write_tar(tmp_path / "fresh.tar", members("a")))
    assert not kept.exists()
