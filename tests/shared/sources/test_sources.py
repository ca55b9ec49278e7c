"""Sources of images: WebDataset's keys, labels and bytes, every way to name a source, and keys in two shards."""

from pathlib import Path

import pytest
import webdataset
from mapet.shared.errors import DataError, UsageError
from mapet.shared.sources.keys import KeyLedger
from mapet.shared.sources.records import read_bytes
from mapet.shared.sources.sources import open_source, read_records


def read_with_webdataset(path: Path) -> dict[str, dict]:
    samples = webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    return {sample["__key__"]: sample for sample in samples}


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


def test_a_folder_of_images_among_tars_is_a_usage_error(tars: list[Path], tmp_path: Path, write_folder, png):
    folder = write_folder(tmp_path / "photos", {"a.png": png()})
    with pytest.raises(UsageError, match="photos is a folder of images"):
        open_source([tars[0], folder])


def test_a_tar_that_is_named_twice_is_taken_once(tars: list[Path]):
    assert [shard.name for shard in open_source([tars[0], tars[0].parent])] == ["t-00", "t-01", "t-02"]


def test_a_missing_path_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


def test_a_key_twice_across_tars_is_an_error_that_names_all(tmp_path: Path, write_tar, png):
    data = png()
    paths = [write_tar(tmp_path / f"{name}.tar", {"k/a.png": data}) for name in ("first", "second")]
    with pytest.raises(DataError, match="'k/a' is in both first and second"):
        read_records(paths)


def test_two_tars_of_one_base_name_are_named_by_their_folders(tmp_path: Path, write_tar, png):
    for side in ("l", "r"):
        (tmp_path / side).mkdir()
        write_tar(tmp_path / side / "same.tar", {f"{side}.png": png()})
    expected = [("l__same", ["l"]), ("r__same", ["r"])]
    assert names_and_keys([tmp_path / "l/same.tar", tmp_path / "r/same.tar"]) == expected
    assert names_and_keys(tmp_path) == expected
    assert names_and_keys(tmp_path / "*" / "same.tar") == expected


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
