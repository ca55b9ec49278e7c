"""Tars: damaged ones and unusable members are errors that name them, or are listed; no image is lost silently."""

import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mapet.shared.errors import DataError
from mapet.shared.sources.records import read_bytes
from mapet.shared.sources.sources import open_source, read_records


def test_a_tar_of_no_bytes_is_an_error_that_names_it(tmp_path: Path):
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match=r"empty\.tar is empty \(0 bytes\)"):
        read_records(tmp_path / "empty.tar")


def test_a_tar_without_images_is_an_error_that_names_it(tmp_path: Path, write_tar):
    tar = write_tar(tmp_path / "texts.tar", {"a.txt": b"x", "a.cls": b"1"})
    with pytest.raises(DataError, match=r"texts\.tar holds no images"):
        read_records(tar)


@pytest.mark.parametrize("name", ["zip.tar", "gz.tar"])
def test_a_file_that_is_not_a_plain_tar_is_an_error_that_names_it(tmp_path: Path, name: str):
    if name == "zip.tar":
        (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(2000))
    else:
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            tar.add(__file__, "a.jpg")
    with pytest.raises(DataError, match=name):
        read_records(tmp_path / name)


@pytest.fixture(scope="module")
def three_images(tmp_path_factory: pytest.TempPathFactory, write_tar, png) -> tuple[Path, bytes, list[int]]:
    """A folder to write in, a tar's bytes, and the offsets of its three members and of the end of the last one."""
    folder = tmp_path_factory.mktemp("cut")
    tar = write_tar(folder / "whole.tar", {f"{name}.png": png(0, 60, 40) for name in "abc"})
    records = open_source(tar)[0].index()
    ends = records[-1].offset + -(-records[-1].length // 512) * 512
    return folder, tar.read_bytes(), [*(record.offset - 512 for record in records), ends]


@pytest.mark.parametrize(("member", "beyond"), [*itertools.product([1, 2], [0, 1, 511, 512, 700]), (3, 0), (3, -600)])
def test_a_tar_truncated_anywhere_is_an_error_that_names_it(three_images, member: int, beyond: int):
    folder, data, starts = three_images
    cut = folder / "cut.tar"
    cut.write_bytes(data[: starts[member] + beyond])
    with pytest.raises(DataError, match=r"cut\.tar"):
        read_records(cut)


def test_a_damaged_header_does_not_lose_images_silently(three_images):
    folder, data, starts = three_images
    damaged = bytearray(data)
    damaged[starts[1] + 150] ^= 1  # in the checksum of the second header
    (folder / "damaged.tar").write_bytes(damaged)
    with pytest.raises(DataError, match=r"damaged\.tar"):
        read_records(folder / "damaged.tar")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.integers(0, 2), at=st.integers(0, 511), value=st.integers(0, 255))
def test_a_changed_header_byte_never_raises_another_error(three_images, header: int, at: int, value: int):
    folder, data, starts = three_images
    damaged = bytearray(data)
    damaged[starts[header] + at] = value
    (folder / "fuzz.tar").write_bytes(damaged)
    try:
        (shard,) = open_source(folder / "fuzz.tar")
        records = shard.index()
    except DataError as error:
        assert "fuzz.tar" in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert len(records) == 3


def test_a_key_twice_in_a_tar_is_an_error_that_names_both(tmp_path: Path, write_tar, png):
    data = png()
    tar = write_tar(tmp_path / "twice.tar", [("a.png", data), ("b.png", data), ("a.png", data)])
    with pytest.raises(DataError, match=r"twice\.tar holds key 'a' twice"):
        read_records(tar)


@pytest.mark.parametrize("text", [b"", b"1.5", b"\xff\xfe", b"1 2", b"9" * 19, b"9" * 9999])
def test_a_label_that_is_no_number_or_name_is_an_error_that_names_it(tmp_path: Path, text: bytes, write_tar, png):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png(), "a.cls": text})
    with pytest.raises(DataError, match=r"x\.tar has an unreadable label .* in 'a\.cls' \(.+\)"):
        read_records(tar)


def tar_with(path: Path, png, **fields) -> Path:
    """A tar of `a.png`, one member with these fields, and `z.png`."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, changes in (("a.png", {}), ("b.png", fields), ("z.png", {})):
            member = tarfile.TarInfo(name)
            member.size = len(png()) if changes.get("type", tarfile.REGTYPE) == tarfile.REGTYPE else 0
            for field, value in changes.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(png()))
    return path


@pytest.mark.parametrize(
    ("fields", "key", "words"),
    [
        ({"name": "/etc/b.png"}, "/etc/b", "holds '/etc/b.png', a name that leaves its folder"),
        ({"name": "../b.png"}, "../b", "holds '../b.png', a name that leaves its folder"),
        ({"name": "x/../../b.png"}, "x/../../b", "holds 'x/../../b.png', a name that leaves its folder"),
        ({"name": "b\udcff.png"}, "b\\udcff", r"holds 'b\udcff.png', and that name is not UTF-8"),
        ({"name": "b.heic"}, "b", "holds 'b.heic', which is not one of jpg, jpeg, png, webp"),
        ({"name": "b.JXL"}, "b", "holds 'b.JXL', which is not one of jpg, jpeg, png, webp"),
        ({"type": tarfile.SYMTYPE, "linkname": "a.png"}, "b", "holds 'b.png', a link to 'a.png'"),
        ({"type": tarfile.LNKTYPE, "linkname": "a.png"}, "b", "holds 'b.png', a link to 'a.png'"),
        ({"type": tarfile.FIFOTYPE}, "b", "holds 'b.png', which is not a regular file"),
        ({"type": tarfile.CHRTYPE}, "b", "holds 'b.png', which is not a regular file"),
    ],
)
def test_an_unusable_member_is_an_error_or_listed(
    tmp_path: Path, png, fields: dict, key: str, words: str, expect_unusable
):
    expect_unusable(tar_with(tmp_path / "x.tar", png, **fields), ["a", "z"], key, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.png", "holds key 'a' twice"),
        ("a.jpg", "holds 'a.png' and 'a.jpg', which have the same key 'a'; choose one with --image-field png"),
        ("a.small.png", "keys end at the first dot: give --key-until last-dot, or choose one with --image-field png"),
    ],
)
def test_a_key_with_two_pictures_is_an_error_or_left_out(tmp_path: Path, png, name: str, words: str, expect_unusable):
    expect_unusable(tar_with(tmp_path / "x.tar", png, name=name), ["z"], "a", words)


def test_a_folder_in_a_tar_is_ignored_whatever_its_name(tmp_path: Path, png, index_and_skipped):
    tar = tar_with(tmp_path / "x.tar", png, type=tarfile.DIRTYPE)
    assert index_and_skipped(tar) == (["a", "z"], [])


def test_a_tar_padded_with_zeros_is_valid(tmp_path: Path, write_tar, png, index_and_skipped):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png()})
    with open(tar, "ab") as file:
        file.write(bytes(3_000_000))
    assert index_and_skipped(tar) == (["a"], [])


@pytest.mark.parametrize("gap", [0, 3_000_000])
def test_two_tars_in_one_file_do_not_lose_the_second_silently(
    tmp_path: Path, write_tar, png, gap: int, expect_unusable
):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png()})
    other = write_tar(tmp_path / "y.tar", {"b.png": png()})
    tar.write_bytes(tar.read_bytes() + bytes(gap) + other.read_bytes())
    expect_unusable(tar, ["a"], "", "goes on after its end")


def test_a_header_that_points_backwards_does_not_loop_for_ever(tmp_path: Path, write_tar, png, expect_unusable):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png(), "b.png": png()})
    data = bytearray(tar.read_bytes())
    at = read_records(tar)[1].offset - 512
    data[at + 124 : at + 136] = (-at - 512).to_bytes(12, "big", signed=True)  # its size, in GNU's binary form
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    tar.write_bytes(data)
    expect_unusable(tar, ["a"], "", "is damaged at byte")


def test_a_truncated_tar_gives_the_images_before_its_end(three_images, tmp_path: Path, expect_unusable):
    _, data, starts = three_images
    (tmp_path / "cut.tar").write_bytes(data[: starts[2] + 700])
    expect_unusable(tmp_path / "cut.tar", ["a", "b"], "c", "is truncated inside 'c.png'")
    (tmp_path / "cut.tar").write_bytes(data[: starts[1] + 100])
    expect_unusable(tmp_path / "cut.tar", ["a"], "", "is truncated or damaged at byte")


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b" + bytes(600), b"PK\x03\x04" + bytes(600), bytes(range(256)) * 20])
def test_a_file_that_is_not_a_tar_is_an_error_or_listed(tmp_path: Path, data: bytes, expect_unusable):
    (tmp_path / "x.tar").write_bytes(data)
    expect_unusable(tmp_path / "x.tar", [], "", "tar" if data else "is empty (0 bytes)")


def test_a_tar_without_images_is_an_error_or_listed(tmp_path: Path, write_tar, expect_unusable):
    expect_unusable(write_tar(tmp_path / "x.tar", {"a.txt": b"-"}), [], "", "holds no images")


def test_unread_formats_beside_a_readable_image_are_ignored(tmp_path: Path, write_tar, png, index_and_skipped):
    assert index_and_skipped(write_tar(tmp_path / "x.tar", {"a.gif": b"-", "a.png": png()})) == (["a"], [])


def test_an_unreadable_tar_is_an_error_or_listed(tmp_path: Path, write_tar, png, run_as_owner, list_source):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png()})
    os.chmod(tar, 0)
    reason = "cannot be read (Permission denied); make it readable"
    assert json.loads(run_as_owner(list_source, tar).stdout) == [[], [["", reason]], ["unreadable"], f"{tar} {reason}."]


def tar_of_tars(folder: Path, write_tar, png) -> Path:
    """`x.tar` with `ant.tar` (a.png, b.png) and `bee.tar` (c.png)."""
    ant = write_tar(folder / "ant.tar", {"a.png": png(0), "b.png": png(1)}).read_bytes()
    bee = write_tar(folder / "bee.tar", {"c.png": png(2)}).read_bytes()
    return write_tar(folder / "x.tar", {"./README": b"-", "ant.tar": ant, "sub/bee.tar": bee})


def test_a_tar_of_tars_is_read_in_place(tmp_path: Path, write_tar, png):
    outer = tar_of_tars(tmp_path, write_tar, png)
    shards = open_source(outer)
    assert [(shard.name, shard.kind) for shard in shards] == [("ant", "tar in tar"), ("sub__bee", "tar in tar")]
    records = read_records(outer)
    assert [(record.key, record.label, record.path) for record in records] == [
        ("a", "ant", outer),
        ("b", "ant", outer),
        ("c", "bee", outer),
    ]
    assert [read_bytes(record) for record in records] == [png(0), png(1), png(2)]
    (alone,) = open_source(tmp_path / "ant.tar")
    assert shards[0].sha256() == alone.sha256()
    assert shards[0].size() == alone.size()


def test_a_damaged_tar_in_a_tar_is_an_error_that_names_both(tmp_path: Path, write_tar, png):
    outer = tar_of_tars(tmp_path, write_tar, png)
    first = read_records(outer)[0].offset
    data = bytearray(outer.read_bytes())
    data[first - 512 + 150] ^= 1  # in the checksum of the inner tar's first header
    outer.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar \(ant\.tar\) is"):
        read_records(outer)


def test_images_beside_tars_in_a_tar_are_an_error(tmp_path: Path, write_tar, png):
    inner = write_tar(tmp_path / "ant.tar", {"a.png": png()}).read_bytes()
    tar = write_tar(tmp_path / "x.tar", {"ant.tar": inner, "b.png": png(1)})
    with pytest.raises(DataError, match=r"x\.tar holds tars such as 'ant\.tar', beside images"):
        read_records(tar)


def test_of_an_image_and_a_picture_of_another_format_the_image_is_taken(tmp_path: Path, write_tar, png):
    tar = write_tar(tmp_path / "x.tar", {"a.depth.tif": b"-", "a.png": png(), "b.tif": b"-"})
    assert [(record.key, record.extension) for record in read_records(tar)] == [("a", "png"), ("b", "tif")]
