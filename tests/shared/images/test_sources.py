"""Sources of images: WebDataset's keys, every way to name a source, and errors for damaged ones."""

import io
import itertools
import json
import os
import re
import socket
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mapet.shared.errors import DataError, UsageError
from mapet.shared.images.folders import FOLDER_SHARD_IMAGES
from mapet.shared.images.records import read_bytes
from mapet.shared.images.sources import KeyLedger, open_source, read_records


def read_with_webdataset(path: Path) -> dict[str, dict]:
    samples = webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    return {sample["__key__"]: sample for sample in samples}


# Keys and labels

NAMES = [
    "plain.jpg",
    "dir/plain.jpg",
    "dir/sub/deep.jpg",
    "dir.v1/dotted.jpg",
    "./here.jpg",
    "two.dots.jpg",
    "space in name.png",
    "größe.webp",
    "UPPER.JPG",
    "dir/same.jpeg",
    "other/same.jpeg",
]


@pytest.fixture
def keyed_tar(tmp_path: Path, write_tar, png) -> Path:
    files = {}
    for number, name in enumerate(NAMES):
        files[name] = png(number)
        if number % 2:
            files[name.rpartition(".")[0] + ".cls"] = f"{number}\n".encode()
    return write_tar(tmp_path / "keys.tar", files)


def test_keys_are_those_of_webdataset(keyed_tar: Path):
    (shard,) = open_source(keyed_tar)
    assert [record.key for record in shard.index()] == list(read_with_webdataset(keyed_tar))


def test_bytes_are_those_of_webdataset(keyed_tar: Path):
    samples = read_with_webdataset(keyed_tar)
    for record in open_source(keyed_tar)[0].index():
        sample = samples[record.key]
        expected = [value for name, value in sample.items() if name.endswith(("jpg", "jpeg", "png", "webp"))]
        assert [read_bytes(record)] == expected


def test_hidden_files_are_ignored(tmp_path: Path, write_tar, write_folder, png):
    # macOS's tar puts "._NAME" beside every NAME; WebDataset ignores them.
    files = {"._a.jpg": b"finder", "a.jpg": png(), "._a.cls": b"finder"}
    tar = write_tar(tmp_path / "x.tar", files)
    assert list(read_with_webdataset(tar)) == ["a"]
    assert [record.key for record in open_source(tar)[0].index()] == ["a"]
    folder = write_folder(tmp_path / "folder", {**files, "d/._b.jpg": b"finder"})
    assert [record.key for record in open_source(folder)[0].index()] == ["a"]


def test_labels_come_from_cls_files(keyed_tar: Path):
    samples = read_with_webdataset(keyed_tar)
    labels = {record.key: record.label for record in open_source(keyed_tar)[0].index()}
    for key, sample in samples.items():
        cls = [value for name, value in sample.items() if name.endswith("cls")]
        assert labels[key] == (int(cls[0]) if cls else None)
    assert any(label is not None for label in labels.values())


def test_a_label_may_precede_its_image(tmp_path: Path, write_tar, png):
    tar = write_tar(tmp_path / "x.tar", {"a.cls": b"7", "a.png": png()})
    assert open_source(tar)[0].index()[0].label == 7


def test_labels_come_from_class_folders_in_sorted_order(tmp_path: Path, write_folder, png):
    data = png()
    root = write_folder(tmp_path / "f", {"dog/1.png": data, "cat/1.png": data, "ant/x/2.png": data})
    (shard,) = open_source(root)
    assert {record.key: record.label for record in shard.index()} == {"ant/x/2": 0, "cat/1": 1, "dog/1": 2}


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


# Ways to name a source


@pytest.fixture
def tars(tmp_path: Path, write_tar, png) -> list[Path]:
    (tmp_path / "tars").mkdir()
    return [
        write_tar(
            tmp_path / f"tars/t-{number:02d}.tar",
            {f"{number}-{n}.png": png(n) for n in range(2)},
        )
        for number in range(3)
    ]


def names_and_keys(source) -> list[tuple[str, list[str]]]:
    return [(shard.name, [record.key for record in shard.index()]) for shard in open_source(source)]


def test_a_pattern_a_directory_and_a_list_name_the_same_tars(tars: list[Path]):
    expected = [(f"t-{number:02d}", [f"{number}-0", f"{number}-1"]) for number in range(3)]
    assert names_and_keys(f"{tars[0].parent}/t-{{00..02}}.tar") == expected
    assert names_and_keys(tars[0].parent) == expected
    assert names_and_keys(tars) == expected
    assert names_and_keys([str(tar) for tar in tars]) == expected
    assert names_and_keys(tars[1]) == expected[1:2]
    assert all(shard.is_tar and shard.size() == shard.root.stat().st_size for shard in open_source(tars))


def test_a_pattern_with_a_missing_tar_is_an_error_that_names_it(tars: list[Path]):
    with pytest.raises(DataError, match=r"t-03\.tar does not exist"):
        open_source(f"{tars[0].parent}/t-{{00..03}}.tar")


def test_an_unbalanced_pattern_is_a_usage_error(tars: list[Path]):
    with pytest.raises(UsageError, match=r"00\.\.02"):
        open_source(f"{tars[0].parent}/t-{{00..02.tar")


def test_an_empty_list_of_sources_is_a_usage_error():
    with pytest.raises(UsageError, match="No images"):
        open_source([])


def test_a_folder_among_tars_is_a_usage_error(tars: list[Path]):
    with pytest.raises(UsageError, match="is a folder"):
        open_source([tars[0], tars[0].parent])


# Missing and damaged sources


def test_a_missing_path_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


def test_a_tar_of_no_bytes_is_an_error_that_names_it(tmp_path: Path):
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match=r"empty\.tar is empty \(0 bytes\)"):
        read_records(tmp_path / "empty.tar")


def test_a_tar_without_images_is_an_error_that_names_it(tmp_path: Path, write_tar):
    tar = write_tar(tmp_path / "texts.tar", {"a.txt": b"x", "a.cls": b"1"})
    with pytest.raises(DataError, match=r"texts\.tar holds no images"):
        read_records(tar)


def test_an_empty_folder_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match=f"{tmp_path} holds neither"):
        read_records(tmp_path)


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


def test_a_key_twice_across_tars_is_an_error_that_names_all(tmp_path: Path, write_tar, png):
    data = png()
    paths = [write_tar(tmp_path / f"{name}.tar", {"k/a.png": data}) for name in ("first", "second")]
    with pytest.raises(DataError, match="'k/a' is in both first and second"):
        read_records(paths)


def test_a_key_twice_in_a_folder_is_an_error_that_names_both(tmp_path: Path, write_folder):
    write_folder(tmp_path, {"a.png": b"-", "a.jpg": b"-"})
    with pytest.raises(DataError, match=r"a\.jpg' and 'a\.png', which have the same key 'a'"):
        read_records(tmp_path)


def test_two_tars_of_one_base_name_are_an_error(tmp_path: Path, write_tar, png):
    for side in ("l", "r"):
        (tmp_path / side).mkdir()
        write_tar(tmp_path / side / "same.tar", {f"{side}.png": png()})
    with pytest.raises(DataError, match="same base name"):
        read_records([tmp_path / "l/same.tar", tmp_path / "r/same.tar"])


@pytest.mark.parametrize("text", [b"cat", b"", b"1.5", b"\xff\xfe", b"1 2", b"9" * 19, b"9" * 9999])
def test_a_label_that_is_not_an_integer_is_an_error_that_names_it(tmp_path: Path, text: bytes, write_tar, png):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png(), "a.cls": text})
    with pytest.raises(DataError, match=r"x\.tar holds .* in 'a\.cls', not a class number"):
        read_records(tar)


def test_a_dangling_link_in_a_folder_is_an_error_that_names_it(tmp_path: Path, write_folder, png):
    write_folder(tmp_path, {"a.png": png()})
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        read_records(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path, write_folder, png):
    write_folder(tmp_path, {os.fsdecode(b"\xff\xfe.png"): png()})
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(tmp_path)


# Unusable images: an error without a list of skipped ones, an item of the list with one


def index_and_skipped(source: Path) -> tuple[list[str], list[tuple[str, str]]]:
    skipped: list[tuple[str, str]] = []
    return [record.key for shard in open_source(source) for record in shard.index(skipped)], skipped


def expect(source: Path, sound: list[str], key: str, words: str) -> None:
    """Without a list an error that names the source and contains `words`; with one, the rest and (key, `words`)."""
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        read_records(source)
    assert str(caught.value).startswith(str(source))
    assert "\n" not in str(caught.value)
    keys, ((skipped, reason),) = index_and_skipped(source)
    assert (keys, skipped) == (sound, key)
    assert words in reason
    assert str(source.parent) not in reason


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
        ({"name": "a.jpg"}, "a", "holds key 'a' twice"),
        ({"name": "b.gif"}, "b", "holds 'b.gif', which is not one of jpg, jpeg, png, webp"),
        ({"name": "b.TIFF"}, "b", "holds 'b.TIFF', which is not one of jpg, jpeg, png, webp"),
        ({"type": tarfile.SYMTYPE, "linkname": "a.png"}, "b", "holds 'b.png', a link to 'a.png'"),
        ({"type": tarfile.LNKTYPE, "linkname": "a.png"}, "b", "holds 'b.png', a link to 'a.png'"),
        ({"type": tarfile.FIFOTYPE}, "b", "holds 'b.png', which is not a regular file"),
        ({"type": tarfile.CHRTYPE}, "b", "holds 'b.png', which is not a regular file"),
    ],
)
def test_an_unusable_member_is_an_error_or_listed(tmp_path: Path, png, fields: dict, key: str, words: str):
    expect(tar_with(tmp_path / "x.tar", png, **fields), ["a", "z"], key, words)


def test_a_folder_in_a_tar_is_ignored_whatever_its_name(tmp_path: Path, png):
    tar = tar_with(tmp_path / "x.tar", png, type=tarfile.DIRTYPE)
    assert index_and_skipped(tar) == (["a", "z"], [])


def test_a_tar_padded_with_zeros_is_valid(tmp_path: Path, write_tar, png):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png()})
    with open(tar, "ab") as file:
        file.write(bytes(3_000_000))
    assert index_and_skipped(tar) == (["a"], [])


@pytest.mark.parametrize("gap", [0, 3_000_000])
def test_two_tars_in_one_file_do_not_lose_the_second_silently(tmp_path: Path, write_tar, png, gap: int):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png()})
    other = write_tar(tmp_path / "y.tar", {"b.png": png()})
    tar.write_bytes(tar.read_bytes() + bytes(gap) + other.read_bytes())
    expect(tar, ["a"], "", "goes on after its end")


def test_a_header_that_points_backwards_does_not_loop_for_ever(tmp_path: Path, write_tar, png):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png(), "b.png": png()})
    data = bytearray(tar.read_bytes())
    at = read_records(tar)[1].offset - 512
    data[at + 124 : at + 136] = (-at - 512).to_bytes(12, "big", signed=True)  # its size, in GNU's binary form
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    tar.write_bytes(data)
    expect(tar, ["a"], "", "is damaged at byte")


def test_a_truncated_tar_gives_the_images_before_its_end(three_images, tmp_path: Path):
    _, data, starts = three_images
    (tmp_path / "cut.tar").write_bytes(data[: starts[2] + 700])
    expect(tmp_path / "cut.tar", ["a", "b"], "c", "is truncated inside 'c.png'")
    (tmp_path / "cut.tar").write_bytes(data[: starts[1] + 100])
    expect(tmp_path / "cut.tar", ["a"], "", "is truncated or damaged at byte")


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b" + bytes(600), b"PK\x03\x04" + bytes(600), bytes(range(256)) * 20])
def test_a_file_that_is_not_a_tar_is_an_error_or_listed(tmp_path: Path, data: bytes):
    (tmp_path / "x.tar").write_bytes(data)
    expect(tmp_path / "x.tar", [], "", "tar" if data else "is empty (0 bytes)")


def test_a_tar_without_images_is_an_error_or_listed(tmp_path: Path, write_tar):
    expect(write_tar(tmp_path / "x.tar", {"a.txt": b"-"}), [], "", "holds no images")


def test_unread_formats_beside_a_readable_image_are_ignored(tmp_path: Path, write_tar, png):
    assert index_and_skipped(write_tar(tmp_path / "x.tar", {"a.gif": b"-", "a.png": png()})) == (["a"], [])


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
        ("b.bmp", Path.touch, "holds 'b.bmp', which is not one of jpg, jpeg, png, webp"),
        ("a.webp", Path.touch, "holds 'a.png' and 'a.webp', which have the same key 'a'"),
        (os.fsdecode(b"b\xff.png"), Path.touch, "and that name is not UTF-8"),
    ],
)
def test_an_unusable_file_in_a_folder_is_an_error_or_listed(tmp_path: Path, write_folder, png, name, make, words: str):
    root = write_folder(tmp_path / "f", {"a.png": png(), "z.png": png()})
    make(root / name)
    expect(root, ["a", "z"], name.partition(".")[0].replace("\udcff", "\\udcff"), words)


def test_a_link_to_a_parent_folder_is_not_followed(tmp_path: Path, write_folder, png):
    root = write_folder(tmp_path / "f", {"cat/a.png": png(), "dog/b.png": png()})
    (root / "cat" / "round").symlink_to(root)
    expect(root, ["cat/a", "dog/b"], "cat/round/", "holds 'cat/round/', a link to a folder that it lies in")
    (root / "cat" / "round").unlink()
    (root / "cat" / "self").symlink_to(".")
    expect(root, ["cat/a", "dog/b"], "cat/self/", "a link to a folder that it lies in")


def test_a_linked_folder_is_followed(tmp_path: Path, write_folder, png):
    root = write_folder(tmp_path / "f", {"cat/a.png": png()})
    (root / "dog").symlink_to(write_folder(tmp_path / "elsewhere", {"b.png": png()}))
    assert index_and_skipped(root) == (["cat/a", "dog/b"], [])
    assert [record.label for record in read_records(root)] == [0, 1]


LIST = """
import json, sys
from mapet.shared.errors import DataError
from mapet.shared.images.sources import open_source, read_records
skipped = []
images = [(record.key, record.label) for shard in open_source(sys.argv[1]) for record in shard.index(skipped)]
digests = [shard.sha256(skip=True) for shard in open_source(sys.argv[1])]
try:
    read_records(sys.argv[1])
except DataError as error:
    print(json.dumps([images, skipped, digests, str(error)]))
"""


def test_an_unreadable_folder_is_an_error_or_listed(tmp_path: Path, write_folder, png, run_as_owner):
    root = write_folder(tmp_path / "f", {f"{name}/1.png": png() for name in ("ant", "cat", "dog")})
    os.chmod(root / "cat", 0)
    images, skipped, _, message = json.loads(run_as_owner(LIST, root).stdout)
    assert images == [["ant/1", 0], ["dog/1", 2]]  # labels do not change
    assert skipped == [["cat/", "holds 'cat/', a folder that cannot be listed (Permission denied)"]]
    assert message == f"{root} {skipped[0][1]}."


def test_an_unreadable_tar_is_an_error_or_listed(tmp_path: Path, write_tar, png, run_as_owner):
    tar = write_tar(tmp_path / "x.tar", {"a.png": png()})
    os.chmod(tar, 0)
    reason = "cannot be read (Permission denied); make it readable"
    assert json.loads(run_as_owner(LIST, tar).stdout) == [[], [["", reason]], ["unreadable"], f"{tar} {reason}."]


@pytest.mark.parametrize("place", ["f", "f/below/x.tar"])
def test_an_unreadable_root_is_an_error_with_its_name(
    tmp_path: Path, write_folder, write_tar, png, run_as_owner, place
):
    root = write_folder(tmp_path / "f", {"a.png": png(), "below/b.png": png()})
    write_tar(root / "below/x.tar", {"a.png": png()})
    os.chmod(root, 0)
    message = run_as_owner(LIST, tmp_path / place).stderr.splitlines()[-1]
    os.chmod(root, 0o755)
    assert message == f"mapet.shared.errors.DataError: {tmp_path / place} cannot be read (Permission denied)."


# Keys that are in two shards


def ledger_of(**keys: list[str]) -> KeyLedger:
    ledger = KeyLedger()
    for shard, names in keys.items():
        ledger.add(shard, names)
    return ledger


def test_a_ledger_counts_keys_and_finds_one_in_two_shards():
    keys = {"one": ["a", "b"], "two": ["c"], "three": []}
    ledger = ledger_of(**keys)
    assert ("one" in ledger, "four" in ledger) == (True, False)
    assert [ledger.count(name) for name in ("one", "two", "three", "four")] == [2, 1, 0, 0]
    ledger.refuse_doubles(keys.__getitem__)
    other = ledger_of(four=["d", "b"])
    ledger.merge(other)
    with pytest.raises(DataError, match="key 'b' is in both four and one"):
        ledger.refuse_doubles({**keys, "four": ["d", "b"]}.__getitem__)


def test_equal_digests_of_different_keys_are_not_duplicates():
    ledger = ledger_of(one=["a"], two=["a"])
    ledger.refuse_doubles({"one": ["a"], "two": ["b"]}.__getitem__)
    KeyLedger().refuse_doubles({}.__getitem__)
