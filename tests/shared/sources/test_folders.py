"""Folders of images: keys, class labels, shards and digests; unusable files are errors or are listed."""

import json
import os
import socket
from pathlib import Path

import pytest
from mapet.shared.errors import DataError
from mapet.shared.sources.folders import FOLDER_SHARD_IMAGES
from mapet.shared.sources.options import SourceOptions
from mapet.shared.sources.sources import open_source, read_records


def test_labels_are_the_names_of_class_folders(tmp_path: Path, write_folder, png):
    data = png()
    root = write_folder(tmp_path / "f", {"dog/1.png": data, "cat/1.png": data, "ant/x/2.png": data})
    (shard,) = open_source(root)
    assert {record.key: record.label for record in shard.index()} == {
        "ant/x/2": "ant",
        "cat/1": "cat",
        "dog/1": "dog",
    }


def test_a_flat_folder_has_no_labels(tmp_path: Path, write_folder, png):
    data = png()
    root = write_folder(tmp_path / "f", {"b.png": data, "a.png": data, "cat/c.png": data, "notes.txt": b"-"})
    (shard,) = open_source(root)
    assert [(record.key, record.label) for record in shard.index()] == [
        ("a", None),
        ("b", None),
        ("cat/c", None),
    ]


def test_a_folder_is_split_into_shards_of_sorted_keys(tmp_path: Path, write_folder, png):
    data = png()
    count = FOLDER_SHARD_IMAGES + 3
    root = write_folder(tmp_path / "f", {f"{number % 7}/{number}.png": data for number in range(count)})
    shards = open_source(root)
    assert [(shard.name, len(shard.index())) for shard in shards] == [
        ("folder-000000", 1000),
        ("folder-000001", 3),
    ]
    keys = [record.key for shard in shards for record in shard.index()]
    assert keys == sorted(f"{number % 7}/{number}" for number in range(count))
    assert not shards[0].is_tar
    assert shards[1].size() == 3 * len(data)


def test_a_folders_digest_depends_on_names_and_bytes(tmp_path: Path, write_folder, png):
    roots = [
        write_folder(tmp_path / "0", {"a.png": png(2), "b.png": png(0)}),
        write_folder(tmp_path / "1", {"a.png": png(2), "b.png": png(0)}),
        write_folder(tmp_path / "2", {"a.png": png(2), "c.png": png(0)}),
        write_folder(tmp_path / "3", {"a.png": png(2), "b.png": png(1)}),
    ]
    digests = [open_source(root)[0].sha256() for root in roots]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_folder_of_an_old_store_is_read_as_it_was(tmp_path: Path, write_folder, png):
    names = ["train/a.small.png", "train/a.large.png", "val/b.jfif", "val/c.gif", "val/d.png"]
    root = write_folder(tmp_path / "f", {name: png() for name in names})
    skipped: list[tuple[str, str]] = []
    (shard,) = open_source(root, SourceOptions(key_until="first-dot", is_old=True))
    assert [(record.key, record.label) for record in shard.index(skipped)] == [("train/a", "train"), ("val/d", "val")]
    both = "holds 'train/a.large.png' and 'train/a.small.png', which have the same key 'train/a'; rename one"
    gif = "holds 'val/c.gif', which is not one of jpg, jpeg, png, webp; convert it"
    assert skipped == [("train/a", both), ("val/c", gif)]
    assert "options" not in shard.describe()


def test_an_empty_folder_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match=f"{tmp_path} holds neither"):
        read_records(tmp_path)


def test_a_key_twice_in_a_folder_is_an_error_that_names_both(tmp_path: Path, write_folder):
    write_folder(tmp_path, {"a.png": b"-", "a.jpg": b"-"})
    with pytest.raises(DataError, match=r"a\.jpg' and 'a\.png', which have the same key 'a'"):
        read_records(tmp_path)


def test_a_dangling_link_in_a_folder_is_an_error_that_names_it(tmp_path: Path, write_folder, png):
    write_folder(tmp_path, {"a.png": png()})
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        read_records(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path, write_folder, png):
    write_folder(tmp_path, {os.fsdecode(b"\xff\xfe.png"): png()})
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(tmp_path)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("b.png", make_fifo, "holds 'b.png', which is not a regular file"),
        ("b.png", make_socket, "holds 'b.png', which is not a regular file"),
        ("b.png", lambda path: path.symlink_to("/dev/zero"), "holds 'b.png', which is not a regular file"),
        ("b.png", make_loop, "holds 'b.png', which cannot be read"),
        ("b.png", lambda path: path.symlink_to("nowhere"), "holds 'b.png', a link to nowhere"),
        ("b.heic", Path.touch, "holds 'b.heic', which is not one of jpg, jpeg, png, webp"),
        (os.fsdecode(b"b\xff.png"), Path.touch, "and that name is not UTF-8"),
    ],
)
def test_an_unusable_file_in_a_folder_is_an_error_or_listed(
    tmp_path: Path, write_folder, png, name, make, words: str, expect_unusable
):
    root = write_folder(tmp_path / "f", {"a.png": png(), "z.png": png()})
    make(root / name)
    expect_unusable(root, ["a", "z"], name.partition(".")[0].replace("\udcff", "\\udcff"), words)


def test_a_key_with_two_pictures_is_an_error_or_left_out(tmp_path: Path, write_folder, png, expect_unusable):
    root = write_folder(tmp_path / "f", {"a.png": png(), "a.webp": png(), "z.png": png()})
    expect_unusable(root, ["z"], "a", "holds 'a.png' and 'a.webp', which have the same key 'a'")


def test_a_link_to_a_parent_folder_is_not_followed(tmp_path: Path, write_folder, png, expect_unusable):
    root = write_folder(tmp_path / "f", {"cat/a.png": png(), "dog/b.png": png()})
    (root / "cat" / "round").symlink_to(root)
    expect_unusable(root, ["cat/a", "dog/b"], "cat/round/", "holds 'cat/round/', a link to a folder that it lies in")
    (root / "cat" / "round").unlink()
    (root / "cat" / "self").symlink_to(".")
    expect_unusable(root, ["cat/a", "dog/b"], "cat/self/", "a link to a folder that it lies in")


def test_a_linked_folder_is_followed(tmp_path: Path, write_folder, png, index_and_skipped):
    root = write_folder(tmp_path / "f", {"cat/a.png": png()})
    (root / "dog").symlink_to(write_folder(tmp_path / "elsewhere", {"b.png": png()}))
    assert index_and_skipped(root) == (["cat/a", "dog/b"], [])
    assert [record.label for record in read_records(root)] == ["cat", "dog"]


def test_an_unreadable_folder_is_an_error_or_listed(tmp_path: Path, write_folder, png, run_as_owner, list_source):
    root = write_folder(tmp_path / "f", {f"{name}/1.png": png() for name in ("ant", "cat", "dog")})
    os.chmod(root / "cat", 0)
    images, skipped, _, message = json.loads(run_as_owner(list_source, root).stdout)
    assert images == [["ant/1", "ant"], ["dog/1", "dog"]]
    assert skipped == [["cat/", "holds 'cat/', a folder that cannot be listed (Permission denied)"]]
    assert message == f"{root} {skipped[0][1]}."


@pytest.mark.parametrize("place", ["f", "f/below/x.tar"])
def test_an_unreadable_root_is_an_error_with_its_name(
    tmp_path: Path, write_folder, write_tar, png, run_as_owner, place, list_source
):
    root = write_folder(tmp_path / "f", {"a.png": png(), "below/b.png": png()})
    write_tar(root / "below/x.tar", {"a.png": png()})
    os.chmod(root, 0)
    message = run_as_owner(list_source, tmp_path / place).stderr.splitlines()[-1]
    os.chmod(root, 0o755)
    assert message == f"mapet.shared.errors.DataError: {tmp_path / place} cannot be read (Permission denied)."
