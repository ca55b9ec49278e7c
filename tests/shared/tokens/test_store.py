"""Token stores: rows are read back as written, as plain Zarr, keys are looked up, and changes are detected."""

import os
import re
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from mapet.shared.errors import DataError
from mapet.shared.images.views import Preprocess
from mapet.shared.storage.files import sha256_file, write_sealed_json
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import COLUMNS, ShardRows
from mapet.shared.tokens.store import (
    SHARD_FORMAT,
    VERSION,
    TokenStore,
    entry_path,
    read_entry,
    write_manifest,
    write_shard,
)
from zarr.codecs import Crc32cCodec
from zarr.storage import ZipStore

K, GRID = 300, (3, 5)
PREPROCESS = Preprocess(40, "squash", 40, "bicubic", (0.5,) * 3, (0.5,) * 3).to_json()
DESCRIPTION = dict.fromkeys(("library", "architecture", "weights_sha256", "precision", "metric"), "x")
DESCRIPTION |= {"layer": -1, "final_norm": False, "preprocess": PREPROCESS, "grid": list(GRID), "k": K}
BOOK = Codebook(np.eye(4, dtype=np.float32), np.zeros(4, dtype=np.int64), DESCRIPTION)
ATTRIBUTES = {
    "codebook_fingerprint": BOOK.fingerprint,
    "view": {"crop": "center", "views": 2},
    "source": {"kind": "tar", "size": None, "sha256": "0" * 64},
}
KEYS = ["plain", "dir.v1/größe", "日本/鍵", "a b", ""]


def rows_of(seed: int, count: int = 5, views: int = 2) -> ShardRows:
    rng = np.random.default_rng(seed)
    return ShardRows(
        keys=np.array([f"{key}{seed}/{n}" for n, key in zip(range(count), KEYS * count, strict=False)], dtype=object),
        tokens=rng.integers(0, K, (count, views, *GRID)).astype(np.uint16),
        crops=rng.random((count, views, 4)) * 1e3,
        flips=rng.random((count, views)) < 0.5,
        sizes=rng.integers(1, 9999, (count, 2)).astype(np.int32),
        labels=rng.integers(-1, 9, count),
        paths=np.array([f"d/ö {n}.jpg" for n in range(count)], dtype=object),
        offsets=rng.integers(0, 2**62, count),
        lengths=rng.integers(0, 2**40, count),
        crc32=rng.integers(0, 2**32, count).astype(np.uint32),
    )


def write_store(path: Path) -> Path:
    write_sealed_json(path / "codebook.json", BOOK.as_json("0" * 64))
    for number in range(2):
        write_shard(path, f"shard-{number}", rows_of(number), ATTRIBUTES)
    entries = [read_entry(path, f"shard-{number}") for number in range(2)]
    write_manifest(path, BOOK.as_json(""), entries)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store")


def assert_equal_rows(one: ShardRows, other: ShardRows) -> None:
    for name in COLUMNS:
        column, expected = getattr(one, name), getattr(other, name)
        assert np.array_equal(column, expected), name
        assert column.dtype == expected.dtype, name
    assert one.classes == other.classes


def test_rows_are_read_back_as_written(store: Path):
    opened = TokenStore(store)
    assert [name for name, _ in opened.shards()] == ["shard-0", "shard-1"]
    for number, (_, rows) in enumerate(opened.shards()):
        assert_equal_rows(rows, rows_of(number))
    assert (len(opened), opened.k, opened.grid) == (10, K, GRID)
    assert opened.tokenizer is opened.codebook
    assert opened.fingerprint == opened.tokenizer["fingerprint"]
    assert "10 images" in repr(opened)


def test_a_shard_larger_than_a_chunk_is_read_back(tmp_path: Path):
    rows = rows_of(3, count=1500, views=1)
    write_shard(tmp_path, "large", rows, ATTRIBUTES)
    with ZipStore(tmp_path / "shards/large.zarr.zip", mode="r") as archive:
        assert np.array_equal(zarr.open_group(archive, mode="r")["tokens"][:], rows.tokens)


def test_find_gives_the_row_of_a_key(store: Path):
    opened = TokenStore(store)
    for number in range(2):
        for at, key in enumerate(rows_of(number).keys):
            rows, row = opened.find(key)
            assert row == at
            assert_equal_rows(rows, rows_of(number))


def test_keys_are_in_the_store_or_not(store: Path):
    opened = TokenStore(store)
    assert all(key in opened for number in range(2) for key in rows_of(number).keys)
    assert all(key not in opened for key in ("unknown", "", "plain0/", "PLAIN0/0", "\ud800", None, 0))


def test_after_the_first_lookup_a_lookup_reads_at_most_one_shard(store: Path):
    opened, (first, second) = TokenStore(store), (rows_of(number).keys[2] for number in range(2))
    assert opened[first].key == first
    (store / "shards/shard-0.zarr.zip").unlink()
    assert opened[second].key == second  # needs shard-1 alone
    (store / "shards/shard-1.zarr.zip").unlink()
    assert "unknown" not in opened  # needs neither
    again = TokenStore(store)
    with pytest.raises(DataError, match="is missing"):
        assert first in again


def test_a_lookup_reads_the_shard_that_has_the_key(store: Path):
    opened, key = TokenStore(store), rows_of(1).keys[2]
    assert "unknown" not in opened
    (store / "shards/shard-0.zarr.zip").unlink()
    assert opened[key].key == key
    os.truncate(store / "shards/shard-1.zarr.zip", 100)
    assert opened[key].key == key  # still in memory
    with pytest.raises(DataError, match=r"shard-0\.zarr\.zip is missing"):
        opened.find(rows_of(0).keys[0])


def test_keys_with_equal_digests_are_told_apart(store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "mapet.shared.sources.keys.key_digests", lambda keys: np.zeros(len(list(keys)), dtype=np.uint64)
    )
    opened = TokenStore(store)
    for number in range(2):
        for at, key in enumerate(rows_of(number).keys):
            assert opened.find(key)[1] == at
            assert np.array_equal(opened[key].tokens, rows_of(number).tokens[at])
    assert "unknown" not in opened


@pytest.mark.parametrize("key", ["unknown", "", "plain0/", "PLAIN0/0"])
def test_find_of_an_unknown_key_is_a_data_error_that_names_it(store: Path, key: str):
    with pytest.raises(DataError, match=f"has no image with key {key!r}"):
        TokenStore(store).find(key)


def all_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_equal_rows_give_equal_bytes_at_any_time(store: Path, tmp_path: Path):
    time.sleep(2.1)  # the timestamps of a zip have a resolution of two seconds
    again = write_store(tmp_path / "again")
    assert len(all_files(store)) == 6
    assert all_files(again) == all_files(store)


def test_no_hidden_files_are_left(store: Path):
    assert not [path for path in store.rglob("*") if path.name.startswith(".")]


def test_plain_zarr_reads_every_array_with_checksums(store: Path):
    with ZipStore(store / "shards/shard-0.zarr.zip", mode="r") as archive:
        group = zarr.open_group(archive, mode="r")
        assert group.metadata.zarr_format == 3
        assert set(group.array_keys()) == set(COLUMNS)
        for name, array in group.arrays():
            assert np.array_equal(array[:].astype(object), getattr(rows_of(0), name).astype(object)), name
            assert any(isinstance(codec, Crc32cCodec) for codec in array.compressors), name
        assert dict(group.attrs) == {"format": SHARD_FORMAT, "version": VERSION, **ATTRIBUTES}


def test_the_entry_states_digest_and_size(store: Path):
    entry, path = read_entry(store, "shard-1"), store / "shards/shard-1.zarr.zip"
    assert (entry["bytes"], entry["sha256"]) == (path.stat().st_size, sha256_file(path))
    assert entry["images"] == 5
    assert {name: entry[name] for name in ATTRIBUTES} == ATTRIBUTES
    assert TokenStore(store).entries["shard-1"] == entry
    assert entry_path(store, "shard-1").is_file()


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    with pytest.raises(TypeError):
        write_shard(tmp_path, "bad", rows_of(0), {"unserialisable": object()})
    assert not all_files(tmp_path)


def test_the_checksums_of_chunks_detect_a_change_without_the_manifest(store: Path):
    path = store / "shards/shard-0.zarr.zip"
    with zipfile.ZipFile(path) as archive:
        files = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    files["tokens/c/0/0/0/0"][20] ^= 1
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, bytes(data))
    with ZipStore(path, mode="r") as archive, pytest.raises(ValueError, match="checksum"):
        zarr.open_group(archive, mode="r")["tokens"][:]


# Missing and damaged files


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_flipped_bit_in_a_shard_is_a_data_error_that_names_it(store: Path, share: float):
    path = store / "shards/shard-1.zarr.zip"
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)
    opened = TokenStore(store)
    with pytest.raises(DataError, match=r"shard-1\.zarr\.zip was changed"):
        opened.read_rows("shard-1")


def test_a_truncated_shard_is_a_data_error_that_names_it(store: Path):
    path = store / "shards/shard-1.zarr.zip"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DataError, match=rf"shard-1\.zarr\.zip has {size - 1} bytes instead of {size}"):
        list(TokenStore(store).shards())


def test_a_missing_shard_is_a_data_error_that_names_it(store: Path):
    (store / "shards/shard-1.zarr.zip").unlink()
    with pytest.raises(DataError, match=r"shard-1\.zarr\.zip is missing"):
        TokenStore(store).find("unknown")


@pytest.mark.parametrize("name", ["manifest.json", "codebook.json"])
def test_a_missing_json_is_a_data_error_that_names_it(store: Path, name: str):
    (store / name).unlink()
    with pytest.raises(DataError, match=name):
        TokenStore(store)


@pytest.mark.parametrize("name", ["manifest.json", "codebook.json"])
def test_a_changed_json_is_a_data_error_that_names_it(store: Path, name: str):
    text = (store / name).read_text()
    (store / name).write_text(text.replace(str(K), str(K + 1), 1))
    with pytest.raises(DataError, match=f"{name} was changed"):
        TokenStore(store)


@pytest.mark.parametrize("name", ["manifest.json", "codebook.json", "shards/shard-0.json"])
def test_an_unknown_version_is_a_data_error_that_names_both(store: Path, name: str):
    text = (store / name).read_text()
    (store / name).write_text(re.sub(r'"version": \d', '"version": 9', text))
    with pytest.raises(DataError, match=rf"{Path(name).name} has .* version 9, and this mapet reads version \d"):
        read_entry(store, "shard-0") if name.startswith("shards") else TokenStore(store)


def test_a_missing_folder_or_a_file_is_a_data_error_that_names_it(store: Path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        TokenStore(store / "nowhere")
    with pytest.raises(DataError, match=r"manifest\.json does not exist or is not a folder"):
        TokenStore(store / "manifest.json")
