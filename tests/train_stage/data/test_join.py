"""The join by key, in columns: what it finds, what it refuses, what it says, and what it leaves behind."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.shared.errors import DataError
from mapet.shared.sources.records import keys_sha256, read_bytes
from mapet.shared.sources.sources import read_records
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.train_stage.data.batch import LoadBatch
from mapet.train_stage.data.dataset import TokenisedImages
from mapet.train_stage.data.join import join
from mapet.train_stage.settings import resolve

from ...warm import warm_python, warm_torchrun


def assert_joined(data: TokenisedImages, records: list, store: TokenStore) -> None:
    """Image by image, in the order of their keys, what tars and store say."""
    rows = {key: (rows, row) for _, rows in store.shards() for row, key in enumerate(rows.keys)}
    records = sorted(records, key=lambda record: record.key)
    assert len(data) == len(records)
    assert data.keys_sha256 == keys_sha256(record.key for record in records)
    for index, record in enumerate(records):
        shard, row = rows[record.key]
        at = data.rows[index]
        assert data.images[at] == index
        assert (data.key(index), data.label(index)) == (record.key, record.label)
        assert data.read(data.record(index), index) == read_bytes(record)
        assert np.array_equal(data.tokens[at], shard.tokens[row])
        assert np.array_equal(data.crops[at], shard.crops[row])
        assert np.array_equal(data.flips[at], shard.flips[row])


def unpack(tars: list[Path], folder: Path) -> Path:
    for tar in tars:
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter="data")
    for path in folder.rglob("*.cls"):
        path.unlink()
    return folder


def test_tars_folders_and_tars_of_other_names_join_to_the_same(chain, tmp_path: Path):
    store = TokenStore(chain.tokens)
    assert_joined(join(chain.images, store), read_records(chain.images), store)
    renamed = shutil.copytree(chain.images, tmp_path / "renamed")
    for number, path in enumerate(sorted(renamed.glob("*.tar"))):
        path.rename(renamed / f"{9 - number}.tar")
    assert_joined(join(renamed, store), read_records(renamed), store)
    some = [chain.tars[1], renamed / "9.tar"]
    assert_joined(join(some, store), read_records(some), store)
    folder = unpack(chain.tars, tmp_path / "folder")
    assert_joined(join(folder, store), read_records(folder), store)


def test_headers_of_a_tar_with_the_encoded_name_and_size_are_not_read(chain, tmp_path: Path, capsys):
    copies = shutil.copytree(chain.images, tmp_path / "images")
    first, second, _ = sorted(copies.glob("*.tar"))
    for tar, size in ((first, first.stat().st_size), (second, second.stat().st_size + 512)):
        tar.write_bytes(bytes(size))  # no tar at all
    data = join([first], TokenStore(chain.tokens))
    assert len(data) == 32
    with pytest.raises(DataError, match="CRC32 differs"):
        data.read(data.record(0), 0)
    with pytest.raises(DataError, match=rf"{second} holds no images"):
        join([first, second], TokenStore(chain.tokens))
    assert "64 rows of" in capsys.readouterr().err


def test_a_key_in_a_known_tar_and_in_another_is_refused(chain, tmp_path: Path):
    other = Path(shutil.copy(chain.tars[0], tmp_path / "other.tar"))
    key = min(record.key for record in read_records(other))
    with pytest.raises(DataError, match=f"key '{key}' is in both {other} and {chain.tars[0]}; keys must be unique"):
        join([chain.tars[0], other], TokenStore(chain.tokens))
    third = Path(shutil.copy(chain.tars[0], tmp_path / "third.tar"))
    with pytest.raises(DataError, match=f"key '{key}' is in both other and third"):
        join([other, third], TokenStore(chain.tokens))


def test_a_store_with_a_key_twice_is_refused(chain, tmp_path: Path):
    """encode-shards never writes one, but folders of shards can be merged by hand."""
    (tmp_path / "a").mkdir()
    tar = Path(shutil.copy(chain.tars[0], tmp_path / "a" / "other.tar"))
    store = encode_shards(tar, chain.codebook, tmp_path / "tokens", batch_size=16)
    double = TokenStore(chain.tokens)
    double.path, double.entries = tmp_path / "both", {**double.entries, **store.entries}
    shutil.copytree(chain.tokens, double.path)
    shutil.copytree(store.path, double.path, dirs_exist_ok=True)
    with pytest.raises(DataError, match=f"{double.path} holds '.*' twice; encode each image once"):
        join(unpack([tar], tmp_path / "folder"), double)
    with pytest.raises(DataError, match=f"{double.path} holds 32 keys twice; encode each image once"):
        join([tar, chain.tars[0]], double)


def test_missing_images_are_counted_beside_those_that_were_found(chain, tmp_path: Path, capsys):
    encode_shards(chain.tars[:2], chain.codebook, tmp_path / "tokens", batch_size=16)
    store = TokenStore(tmp_path / "tokens")
    with pytest.raises(DataError, match=r"32 of 96 images have no tokens in .*; encode them"):
        join(chain.images, store)
    assert_joined(join(chain.images, store, skip_missing=True), read_records(chain.tars[:2]), store)
    assert "32 of 96 images have no tokens" in capsys.readouterr().err


def test_keys_of_any_length_and_alphabet_keep_their_order(chain, tmp_path: Path, write_tar):
    contents = [read_bytes(record) for record in read_records(chain.tars[0])[:5]]
    names = ["b", "a" * 90, "a/é", "a/\U0001f600", "a/z"]
    tar = write_tar(tmp_path / "t.tar", {f"{n}.jpg": content for n, content in zip(names, contents, strict=True)})
    store = encode_shards(tar, chain.codebook, tmp_path / "tokens", batch_size=16)
    data = join(tar, store)
    assert [data.key(index) for index in range(5)] == sorted(names)
    assert_joined(data, read_records(tar), store)


def test_keys_of_equal_digests_join_to_their_own_images(chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    renamed = Path(shutil.copy(chain.tars[0], tmp_path / "renamed.tar"))
    module = "mapet.train_stage.data.listing"
    monkeypatch.setattr(f"{module}.key_digests", lambda keys: np.zeros(len(list(keys)), dtype=np.uint64))
    store = TokenStore(chain.tokens)
    assert_joined(join(renamed, store), read_records(renamed), store)


MANY = """
import os, sys
from mapet.shared.errors import DataError
from mapet.shared.runtime.distributed import joined_world
from mapet.shared.tokens.store import TokenStore
from mapet.train_stage.data.join import join
with joined_world() as world:
    try:
        join("nothing.tar", TokenStore(sys.argv[2]), world=world)
    except (DataError, SystemExit) as error:
        print(repr(error)[:13], file=sys.stderr, flush=True)
    data = join(sys.argv[1], TokenStore(sys.argv[2]), world=world)
    world.wait()
    with open("/proc/self/maps") as maps:
        (mapped,) = {line.split()[-1] for line in maps if "/mapet-" in line}
    with open(f"{sys.argv[0]}.{world.rank}", "w") as found:
        print(len(data), data.keys_sha256, data.key(5), int(data.tokens.sum()), mapped, file=found)
"""


def launch(processes: int, script: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    start = [*warm_torchrun(), "--standalone", "--nproc-per-node", str(processes), "--no-python"]
    return subprocess.run(
        [*start, *warm_python(), script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RANK": "", **environment},
    )


def test_two_processes_share_what_the_first_one_found_and_leave_nothing(chain, tmp_path: Path):
    script = tmp_path / "join.py"
    script.write_text(MANY)
    (tmp_path / "tmp").mkdir()
    ran = launch(2, script, chain.images, chain.tokens, TMPDIR=str(tmp_path / "tmp"))
    assert ran.returncode == 0, ran.stderr
    data = join(chain.images, TokenStore(chain.tokens))
    for rank in range(2):
        found = Path(f"{script}.{rank}").read_text()
        assert found == f"96 {data.keys_sha256} {data.key(5)} {int(data.tokens.sum())} (deleted)\n"
    assert ran.stderr.count("DataError(") == ran.stderr.count("SystemExit(1)") == 1, ran.stderr
    assert not list((tmp_path / "tmp").glob("mapet-*"))


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16384", "none", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_no_room_for_the_index_is_one_sentence(chain, small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(DataError, match=rf"temporary folder {small_disk} \(No space left on device\); make room"):
        join(chain.images, TokenStore(chain.tokens))
    assert not list(small_disk.iterdir())


def test_samples_of_every_way_to_join_are_equal(chain, tmp_path: Path):
    store, settings = TokenStore(chain.tokens), resolve("vit-tiny-16", ["model.image_size=64", "model.patch_size=8"])
    ways = [chain.images, unpack(chain.tars, tmp_path / "folder")]
    one, other = (LoadBatch(join(images, store), settings) for images in ways)
    for place in ((0, 0), (1, 60)):
        ours, theirs = one([place]), other([place])
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
