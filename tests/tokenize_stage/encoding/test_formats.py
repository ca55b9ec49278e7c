"""encode-shards --format webdataset: tars that stand alone, with the rows, checks and resume of the other format."""

import io
import json
import os
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from mapet.shared.errors import DataError, UsageError
from mapet.shared.sources.records import ImageRecord, read_bytes
from mapet.shared.sources.sources import open_source, read_records
from mapet.shared.tokens.rows import COLUMNS, NO_LABEL, ShardRows
from mapet.shared.tokens.store import TokenStore, write_shard
from mapet.tokenize_stage.encode_shards import encode_shards, encode_shards_dry_run, show_estimate
from mapet.tokenize_stage.inspect import inspect
from mapet.tokenize_stage.verify import verify
from PIL import Image

from ...warm import warm_command, warm_torchrun

VIEWS = {"crop": "random-resized", "views": 3, "seed": 5, "format": "webdataset"}
IN_THEIR_FILE = ("offsets", "lengths", "paths")


def encode(images, chain, out: Path, **options) -> TokenStore:
    return encode_shards(images, chain.codebook, out, batch_size=16, **options)


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def assert_same_rows(one: ShardRows, other: ShardRows, *, besides: tuple[str, ...] = ()) -> None:
    for name in COLUMNS:
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype, name
        if name not in besides:
            assert np.array_equal(left, right), name
    assert one.classes == other.classes


@pytest.fixture(scope="module")
def tars(chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain's pictures with three views, in the tar format; not to be changed."""
    out = tmp_path_factory.mktemp("tars") / "store"
    encode(chain.images, chain, out, **VIEWS)
    return out


@pytest.fixture
def store(tars: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(tars, tmp_path / "store"))


# What is written


def test_both_formats_hold_the_same_rows(chain, tars: Path, tmp_path: Path):
    zarr = encode(chain.images, chain, tmp_path / "zarr", **VIEWS | {"format": "zarr"})
    opened = TokenStore(tars)
    assert (opened.storage, zarr.storage) == ("webdataset", "zarr")
    assert (opened.manifest["storage"], zarr.manifest["storage"]) == ("webdataset", "zarr")
    for (name, rows), (other, expected) in zip(opened.shards(), zarr.shards(), strict=True):
        assert name == other
        assert_same_rows(rows, expected, besides=IN_THEIR_FILE)
        assert rows.lengths.tolist() == expected.lengths.tolist()
        tar = (tars / "shards" / f"{name}.tar").read_bytes()
        for offset, length, crc32 in zip(rows.offsets, rows.lengths, rows.crc32, strict=True):
            assert zlib.crc32(tar[offset : offset + length]) == crc32


def test_a_plain_webdataset_pipeline_reads_images_labels_tokens_and_views(chain, tars: Path):
    urls = [str(path) for path in sorted(tars.glob("shards/*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    records = {record.key: record for record in read_records(chain.images)}
    rows = {key: (shard, at) for _, shard in TokenStore(tars).shards() for at, key in enumerate(shard.keys)}
    assert len(samples) == 96
    for sample in samples:
        record, (shard, at) = records[sample["__key__"]], rows[sample["__key__"]]
        assert sample["cls"] == record.label
        assert np.array_equal(sample["tokens.npy"], shard.tokens[at])
        assert sample["tokens.npy"].dtype == np.uint16
        with Image.open(io.BytesIO(read_bytes(record))) as image:
            assert np.array_equal(np.asarray(sample["jpg"]), np.asarray(image.convert("RGB")))
        about = sample["views.json"]
        assert about["crops"] == shard.crops[at].tolist()
        assert about["flips"] == shard.flips[at].tolist()
        assert about["size"] == [64, 64]
        assert about["crc32"] == zlib.crc32(read_bytes(record))
        assert about["codebook_fingerprint"] == TokenStore(tars).fingerprint


def test_odd_keys_kinds_and_missing_labels_come_back(chain, tmp_path: Path, write_tar):
    image = Image.open(io.BytesIO(read_bytes(read_records(chain.images)[0])))

    def encoded(format: str) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format)
        return buffer.getvalue()

    jpeg, png, webp = (encoded(format) for format in ("JPEG", "PNG", "WEBP"))
    names = {
        "dir.v1/größe.JPG": jpeg,
        "日本/鍵.png": png,
        "a b.more.dots.webp": webp,
        "./x.jpeg": jpeg,
        "__meta__/deep.er/y.jpg": jpeg,
        f"{'long/' * 60}{'n' * 200}.jpg": jpeg,
    }
    source = write_tar(tmp_path / "odd.tar", [*names.items(), ("日本/鍵.cls", b"-1"), ("a b.cls", b"7")])
    records = open_source(source)[0].index()
    out = encode(source, chain, tmp_path / "tars", format="webdataset")
    ((_, rows),) = out.shards()
    ((_, expected),) = encode(source, chain, tmp_path / "zarr").shards()
    assert_same_rows(rows, expected, besides=IN_THEIR_FILE)
    assert rows.keys.tolist() == [record.key for record in records]
    assert rows.labels[2] == 7
    again = open_source(out.path / "shards/odd.tar")[0].index()
    assert [record.key for record in again] == rows.keys.tolist()
    assert [read_bytes(record) for record in again] == list(names.values())
    with tarfile.open(out.path / "shards/odd.tar") as tar:
        kinds = [name.rpartition(".")[2] for name in tar.getnames() if not name.endswith(("cls", "json", "npy"))]
    assert kinds == ["jpg", "png", "webp", "jpeg", "jpg", "jpg"]


def test_a_folder_becomes_tars_that_need_it_no_longer(chain, tmp_path: Path):
    for number, record in enumerate(read_records(chain.tars[0])[:6]):
        path = tmp_path / f"folder/class{number % 2}/{record.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_bytes(record))
    out = encode(tmp_path / "folder", chain, tmp_path / "tars", format="webdataset")
    assert verify(out.path, images=str(tmp_path / "folder")) == 6
    shutil.rmtree(tmp_path / "folder")
    ((name, rows),) = out.shards()
    assert rows.labels.tolist() == [0, 0, 0, 1, 1, 1]
    content = out.tar_of(name).read_bytes()
    for offset, length, crc32 in zip(rows.offsets, rows.lengths, rows.crc32, strict=True):
        assert zlib.crc32(content[offset : offset + length]) == crc32


def test_a_shard_of_which_all_was_skipped_is_an_empty_tar(chain, tmp_path: Path, write_tar):
    source = write_tar(tmp_path / "bad.tar", [("a.jpg", b"no image")])
    out = encode([chain.tars[0], source], chain, tmp_path / "tars", format="webdataset", on_error="skip")
    assert len(out) == 32
    assert [key for _, key, _ in out.skipped()] == ["a"]
    assert len(out.read_rows("bad")) == 0
    assert out.read_rows("bad").tokens.shape == (0, 1, 8, 8)
    assert verify(out.path) == 32


# Nothing is done twice, and the bytes are the same however it runs


def test_views_added_later_give_the_bytes_of_all_views_at_once(chain, tars: Path, tmp_path: Path):
    out = tmp_path / "grown"
    encode(chain.images, chain, out, **VIEWS | {"views": 1})
    before = dict(TokenStore(out).shards())
    encode(chain.images, chain, out, **VIEWS)
    assert files_of(out) == files_of(tars)
    for name, rows in TokenStore(out).shards():
        assert np.array_equal(rows.tokens[:, :1], before[name].tokens)


def test_a_second_run_touches_nothing_and_a_lost_or_cut_tar_is_made_again(chain, tars: Path, store: Path):
    whole = files_of(tars)

    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in store.rglob("*")}

    before = times()
    encode(chain.images, chain, store, **VIEWS)
    assert times() == before
    first, second = sorted(store.glob("shards/*.tar"))[:2]
    first.unlink()
    os.truncate(second, 5000)
    encode(chain.images, chain, store, **VIEWS)
    assert files_of(store) == whole


def test_two_processes_write_the_same_bytes(chain, tars: Path, tmp_path: Path):
    command = [*warm_torchrun(), "--standalone", "--nproc-per-node=2", "--no-python"]
    command += [*warm_command(), "tokenize", "encode-shards"]
    command += [chain.images, "--codebook", chain.codebook, "--out", tmp_path / "out", "--format", "webdataset"]
    command += ["--crop", "random-resized", "--views", "3", "--seed", "5", "--batch-size", "16", "--device", "cpu"]
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert files_of(tmp_path / "out") == files_of(tars)


@pytest.mark.parametrize(("before", "now"), [("zarr", "webdataset"), ("webdataset", "zarr")])
def test_a_store_keeps_its_format(chain, tmp_path: Path, before: str, now: str):
    encode(chain.tars[0], chain, tmp_path / "store", format=before)
    files = files_of(tmp_path / "store")
    for images in (chain.tars[0], chain.tars[1]):
        with pytest.raises(UsageError, match=f"begun with --format {before} and now --format {now} is given"):
            encode(images, chain, tmp_path / "store", format=now)
    assert files_of(tmp_path / "store") == files


def test_an_unknown_format_is_a_usage_error(chain, tmp_path: Path):
    with pytest.raises(UsageError, match="--format parquet is unknown; choose zarr or webdataset"):
        encode(chain.images, chain, tmp_path / "store", format="parquet")
    assert not (tmp_path / "store").exists()


def test_a_dry_run_says_about_how_large_the_tars_will_be(chain, tars: Path, tmp_path: Path, capsys):
    estimate = encode_shards_dry_run(chain.images, chain.codebook, tmp_path / "store", batch_size=16, **VIEWS)
    show_estimate(estimate)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│ bytes"))
    stated = int(line.split("│")[2].split()[0].replace(",", ""))
    written = sum(path.stat().st_size for path in tars.glob("shards/*.tar"))
    assert stated == pytest.approx(written, rel=0.1)


# What is wrong is found


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_inspect_and_verify_read_a_sound_store(chain, tars: Path):
    assert verify(tars, codebook=chain.codebook, images=str(chain.images)) == 96
    about = inspect(tars, key=read_records(chain.images)[40].key)
    assert (about["storage"], about["images"], about["views"], about["labelled"]) == ("webdataset", 96, 288, 96)
    assert len(about["image"]["views"]) == 3


@pytest.mark.parametrize("ending", [".cls", ".tokens.npy", ".views.json"])
def test_a_flipped_bit_beside_an_image_is_found_at_every_reading(store: Path, ending: str):
    path = sorted(store.glob("shards/*.tar"))[1]
    with tarfile.open(path) as tar:
        member = [member for member in tar if member.name.endswith(ending)][9]
    flip_bit(path, member.offset_data + member.size - 1)
    with pytest.raises(DataError, match=rf"{path.name} .*; delete it and its .json"):
        list(TokenStore(store).shards())


def test_a_flipped_bit_in_an_image_is_found_by_verify(store: Path):
    path = sorted(store.glob("shards/*.tar"))[1]
    rows = TokenStore(store).read_rows(path.stem)
    flip_bit(path, int(rows.offsets[9]) + 100)
    with pytest.raises(DataError, match=rf"{path.name} was changed"):
        verify(store)


def test_a_missing_and_a_foreign_tar_are_found(store: Path):
    first, second = sorted(store.glob("shards/*.tar"))[:2]
    shutil.copy(first, first.with_name("foreign.tar"))
    with pytest.raises(DataError, match=r"foreign\.tar is not in the manifest"):
        verify(store)
    second.unlink()
    with pytest.raises(DataError, match=rf"{second.name} is missing"):
        TokenStore(store).read_rows(second.stem)


def test_a_tar_that_something_else_wrote_is_no_shard(chain, store: Path):
    opened = TokenStore(store)
    entry = store / "shards" / f"{chain.tars[0].stem}.tar"
    shutil.copy(chain.tars[0], entry)
    about = {**opened.entries[chain.tars[0].stem], "bytes": entry.stat().st_size}
    opened.entries[chain.tars[0].stem] = about
    with pytest.raises(DataError, match="is not a tar of images and their tokens"):
        opened.read_rows(chain.tars[0].stem)


def test_an_image_that_changes_while_it_is_encoded_leaves_no_tar(chain, tars: Path, tmp_path: Path):
    name = chain.tars[0].stem
    rows = TokenStore(tars).read_rows(name)
    records = {record.key: record for record in read_records(chain.tars[0])}
    images = [records[key] for key in rows.keys]
    other = images[3]
    images[3] = ImageRecord(other.key, other.path, other.offset + 1, other.length, other.label)
    with pytest.raises(DataError, match=f"image '{other.key}' changed while it was encoded"):
        write_shard(tmp_path, name, rows, {"codebook_fingerprint": "f" * 64}, images)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_tokenised_tars_are_a_source_like_any_other(chain, tars: Path, tmp_path: Path):
    """`open_source` reads them as images; encoding them again gives the rows that they hold."""
    again = encode(tars / "shards", chain, tmp_path / "again", **VIEWS)
    for (_, rows), (_, expected) in zip(again.shards(), TokenStore(tars).shards(), strict=True):
        assert_same_rows(rows, expected)
    assert (np.concatenate([rows.labels for _, rows in again.shards()]) != NO_LABEL).all()
    assert json.loads((tmp_path / "again/manifest.json").read_text())["shards"] != TokenStore(tars).manifest["shards"]
