"""encode-shards: the right tokens, the same bytes however it runs, and nothing half done under a final name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import faiss
import numpy as np
import open_clip
import pytest
import torch
from mapet.shared.codebook import Codebook
from mapet.shared.errors import DataError, FingerprintMismatch, UsageError
from mapet.shared.images import read_bytes, read_image
from mapet.shared.sources import open_source, read_records
from mapet.shared.token_store import NO_LABEL, ShardRows, TokenStore
from mapet.shared.views import Preprocess, center_box
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def times_of(store: Path) -> dict[str, int]:
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def all_rows(store: Path) -> list[tuple[str, ShardRows]]:
    return list(TokenStore(store).shards())


def tokens_by_key(store: Path) -> dict[str, np.ndarray]:
    return {key: rows.tokens[at] for _, rows in all_rows(store) for at, key in enumerate(rows.keys)}


def tokens_without_mapet(tower: str, codebook: Path, images: list, layer: int = -1) -> np.ndarray:
    """By open_clip's own preprocessing and features, and FAISS's own search over the saved centroids."""
    from safetensors.numpy import load_file

    model, _, preprocess = open_clip.create_model_and_transforms(tower)
    pixels = torch.stack([preprocess(image) for image in images])
    with torch.no_grad():
        given = model.eval().visual.forward_intermediates(pixels, indices=[layer], intermediates_only=True)
    maps = given["image_intermediates"][0]
    index = faiss.IndexFlatL2(maps.shape[1])
    index.add(load_file(codebook / "centroids.safetensors")["centroids"])
    features = np.ascontiguousarray(maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).numpy())
    return index.search(features, 1)[1].reshape(len(images), *maps.shape[2:])


# The right tokens


def test_tokens_are_those_of_open_clip_and_faiss(chain, tower: str):
    records = read_records(chain.images)
    expected = tokens_without_mapet(tower, chain.codebook, [read_image(record)[0] for record in records])
    tokens = tokens_by_key(chain.tokens)
    assert len(tokens) == len(records) == 96
    found = np.stack([tokens[record.key][0] for record in records])
    assert found.shape == expected.shape == (96, 8, 8)
    # Batches of another size may round a tie the other way; a wrong crop, order or norm changes far more.
    assert (found != expected).sum() <= 1
    assert len(np.unique(found)) > 8


def test_tokens_of_photographs_are_those_of_open_clip_and_faiss(tmp_path: Path, write_tar):
    data = Path(__file__).parents[2].parent / "shared"
    if not (data / "data/photos-000000.tar").is_file() or not (data / "clip/lit-effnet-lite0").is_dir():
        pytest.skip("the shared photographs and the tower lit-effnet-lite0 are not here")
    tower = f"local-dir:{data / 'clip/lit-effnet-lite0'}"
    records = open_source(data / "data/photos-000000.tar")[0].index()[:16]
    tar = write_tar(tmp_path / "photos.tar", [(f"{record.key}.jpg", read_bytes(record)) for record in records])
    build_codebook(tar, tmp_path / "book", tower=tower, layer=3, k=32, iterations=5, restarts=1, batch_size=16)
    encode_shards(tar, tmp_path / "book", tmp_path / "tokens", batch_size=16)
    expected = tokens_without_mapet(tower, tmp_path / "book", [read_image(record)[0] for record in records], 3)
    tokens = tokens_by_key(tmp_path / "tokens")
    found = np.stack([tokens[record.key][0] for record in records])
    assert found.shape == expected.shape == (16, 14, 14)
    assert (found != expected).sum() <= 2


def test_rows_say_where_every_image_lies_and_what_was_seen(chain):
    preprocess = Preprocess.from_json(Codebook.load(chain.codebook).description["preprocess"])
    for shard, (name, rows) in zip(open_source(chain.images), all_rows(chain.tokens), strict=True):
        assert name == shard.name
        data = shard.root.read_bytes()
        for at, record in enumerate(shard.index()):
            image, encoded = read_image(record)
            start = rows.offsets[at]
            assert rows.keys[at] == record.key
            assert data[start : start + rows.lengths[at]] == encoded
            assert rows.crc32[at] == zlib.crc32(encoded)
            assert rows.labels[at] == record.label
            assert rows.sizes[at].tolist() == [image.height, image.width]
            assert rows.crops[at, 0].tolist() == list(center_box(preprocess, image.width, image.height))
        assert not rows.flips.any()
        assert not any(rows.paths)


def test_cosine_tokens_are_of_the_largest_cosine(chain, tower: str, tmp_path: Path):
    book = build_codebook(chain.tars[0], tmp_path / "book", tower=tower, k=8, metric="cosine", iterations=5, restarts=1)
    encode_shards(chain.tars[0], tmp_path / "book", tmp_path / "tokens")
    records = open_source(chain.tars[0])[0].index()
    model, _, preprocess = open_clip.create_model_and_transforms(tower)
    with torch.no_grad():
        maps = model.eval().visual.forward_intermediates(
            torch.stack([preprocess(read_image(record)[0]) for record in records]),
            indices=[-1],
            intermediates_only=True,
        )["image_intermediates"][0]
    cosine = torch.nn.functional.normalize(maps.permute(0, 2, 3, 1), dim=-1).numpy() @ book.centroids.T
    (_, rows) = all_rows(tmp_path / "tokens")[0]
    assert (rows.tokens[:, 0] != cosine.argmax(-1)).sum() <= 1


# The same bytes however it runs


def test_batch_size_does_not_change_tokens(chain, tmp_path: Path):
    before = tokens_by_key(chain.tokens)
    for size in (5, 32):
        encode_shards(chain.images, chain.codebook, tmp_path / str(size), batch_size=size)
        after = tokens_by_key(tmp_path / str(size))
        assert after.keys() == before.keys()
        assert all(np.array_equal(after[key], before[key]) for key in before)


def test_worker_processes_and_time_do_not_change_a_byte(chain, tmp_path: Path):
    encode_shards(chain.images, chain.codebook, tmp_path / "tokens", batch_size=16, workers=2)
    assert files_of(tmp_path / "tokens") == files_of(chain.tokens)
    assert len(files_of(chain.tokens)) == 8


def test_tars_and_class_folders_of_the_same_files_give_the_same_tokens(chain, tmp_path: Path):
    for shard in open_source(chain.images):
        for record in shard.index():
            path = tmp_path / f"folder/class{record.label:02d}/{record.key}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read_bytes(record))
    encode_shards(tmp_path / "folder", chain.codebook, tmp_path / "tokens", batch_size=16)
    (name, rows) = all_rows(tmp_path / "tokens")[0]
    assert name == "folder-000000"
    assert list(rows.keys) == sorted(rows.keys)
    before = tokens_by_key(chain.tokens)
    for at, key in enumerate(rows.keys):
        assert rows.paths[at] == f"{key}.jpg"
        assert np.array_equal(rows.tokens[at], before[key.partition("/")[2]]), key
    classes = sorted({key.partition("/")[0] for key in rows.keys})
    assert rows.labels.tolist() == [classes.index(key.partition("/")[0]) for key in rows.keys]
    assert (rows.offsets == 0).all()


def test_images_without_labels_say_so(chain, tmp_path: Path, write_tar):
    record = open_source(chain.images)[0].index()[0]
    tar = write_tar(tmp_path / "one.tar", [("a/b.jpg", read_bytes(record))])
    encode_shards(tar, chain.codebook, tmp_path / "tokens")
    (_, rows) = all_rows(tmp_path / "tokens")[0]
    assert (rows.keys.tolist(), rows.labels.tolist()) == (["a/b"], [NO_LABEL])


# Nothing is done twice


def test_a_second_run_touches_nothing(chain, store: Path):
    before = times_of(store)
    encode_shards(chain.images, chain.codebook, store)
    assert times_of(store) == before


@pytest.mark.parametrize("suffix", [".zarr.zip", ".json"])
def test_a_shard_deleted_by_hand_is_made_again_and_no_other(chain, store: Path, suffix: str):
    before, victim = times_of(store), f"shards/{chain.tars[1].stem}{suffix}"
    (store / victim).unlink()
    encode_shards(chain.images, chain.codebook, store, batch_size=16)
    assert files_of(store) == files_of(chain.tokens)
    untouched = {name for name in before if not name.startswith(f"shards/{chain.tars[1].stem}") and "shards" in name}
    assert len(untouched) == 4
    assert {name: times_of(store)[name] for name in untouched} == {name: before[name] for name in untouched}


def test_a_cut_shard_is_made_again(chain, store: Path):
    victim = store / f"shards/{chain.tars[1].stem}.zarr.zip"
    os.truncate(victim, 100)
    encode_shards(chain.images, chain.codebook, store, batch_size=16)
    assert files_of(store) == files_of(chain.tokens)


def test_shards_can_be_added_later(chain, tmp_path: Path):
    encode_shards(chain.tars[:1], chain.codebook, tmp_path / "tokens", batch_size=16)
    assert len(TokenStore(tmp_path / "tokens")) == 32
    encode_shards(chain.tars[1:], chain.codebook, tmp_path / "tokens", batch_size=16)
    assert files_of(tmp_path / "tokens") == files_of(chain.tokens)


def test_a_missing_manifest_is_made_again(chain, store: Path):
    (store / "manifest.json").unlink()
    encode_shards(chain.images, chain.codebook, store)
    assert files_of(store) == files_of(chain.tokens)


# What must not be mixed


def test_another_codebook_into_the_same_store_is_a_mismatch_that_names_both(chain, tower: str, store: Path, tmp_path):
    other = build_codebook(chain.images, tmp_path / "other", tower=tower, k=9, iterations=2, restarts=1)
    before = files_of(store)
    with pytest.raises(FingerprintMismatch) as caught:
        encode_shards(chain.images, tmp_path / "other", store)
    assert other.fingerprint[:12] in str(caught.value)
    assert Codebook.load(chain.codebook).fingerprint[:12] in str(caught.value)
    assert files_of(store) == before


def test_another_tower_is_a_mismatch(chain, resnet_tower: str, tmp_path: Path):
    with pytest.raises(FingerprintMismatch, match="is not the tower of the codebook"):
        encode_shards(chain.images, chain.codebook, tmp_path / "tokens", tower=resnet_tower)
    assert not (tmp_path / "tokens").exists()


def test_the_same_tower_elsewhere_gives_the_same_bytes(chain, tower_copy: Path, tmp_path: Path):
    encode_shards(chain.images, chain.codebook, tmp_path / "tokens", tower=f"local-dir:{tower_copy}", batch_size=16)
    assert files_of(tmp_path / "tokens") == files_of(chain.tokens)


def test_the_same_weights_with_another_preprocessing_are_a_mismatch(chain, tower_copy: Path, tmp_path: Path):
    config = json.loads((tower_copy / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tower_copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(FingerprintMismatch, match="preprocess"):
        encode_shards(chain.images, chain.codebook, tmp_path / "tokens", tower=f"local-dir:{tower_copy}")


def test_a_source_that_changed_since_is_a_data_error_that_names_it(chain, source: Path, store: Path, write_tar):
    tar = source / chain.tars[1].name
    write_tar(tar, [("new.jpg", read_bytes(open_source(chain.images)[1].index()[0]))])
    with pytest.raises(DataError, match=rf"{tar.name} has \d+ bytes and had \d+ when"):
        encode_shards(source, chain.codebook, store)
    assert files_of(store) == files_of(chain.tokens)


def test_an_unknown_crop_and_a_foreign_folder_are_usage_errors(chain, tmp_path: Path):
    with pytest.raises(UsageError, match="--crop random is unknown"):
        encode_shards(chain.images, chain.codebook, tmp_path / "tokens", crop="random")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="is not empty and no token store"):
        encode_shards(chain.images, chain.codebook, tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


# Interrupted


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_second_shard_and_a_repair_finishes_it(
    chain, source: Path, tmp_path: Path, workers: int
):
    victim, out = source / chain.tars[1].name, tmp_path / "tokens"
    record = open_source(source)[1].index()[20]
    data = bytearray(victim.read_bytes())
    data[record.offset : record.offset + 50] = bytes(50)
    victim.write_bytes(data)
    with pytest.raises(DataError, match=rf"{victim.name}: image '{record.key}'"):
        encode_shards(source, chain.codebook, out, batch_size=16, workers=workers)
    assert sorted(files_of(out)) == [
        "codebook.json",
        f"shards/{chain.tars[0].stem}.json",
        f"shards/{chain.tars[0].stem}.zarr.zip",
    ]
    with pytest.raises(DataError, match=r"no manifest\.json"):
        TokenStore(out)
    before = times_of(out)
    shutil.copy(chain.tars[1], victim)
    encode_shards(source, chain.codebook, out, batch_size=16, workers=workers)
    assert files_of(out) == files_of(chain.tokens)
    assert before.items() <= times_of(out).items()


def test_what_was_killed_before_the_first_shard_goes_on(chain, tmp_path: Path):
    out = tmp_path / "tokens"
    out.mkdir()
    (out / ".codebook.json.partial").write_text('{"form')
    encode_shards(chain.images, chain.codebook, out, batch_size=16)
    assert files_of(out) == files_of(chain.tokens)


def wait_for(path: Path, process: subprocess.Popen, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)


def test_a_killed_run_given_again_ends_byte_identical(chain, tmp_path: Path, write_tar):
    # One image at a time, so that there is time to kill it between the first shard and the last.
    members = []
    for tar in chain.tars:
        with tarfile.open(tar) as opened:
            members += [
                (member.name, opened.extractfile(member).read()) for member in opened if member.name.endswith("jpg")
            ]
    (tmp_path / "tars").mkdir()
    for number in range(12):
        write_tar(tmp_path / f"tars/t{number:02d}.tar", [(f"{number}-{name}", data) for name, data in members[:40]])
    encode_shards(tmp_path / "tars", chain.codebook, tmp_path / "whole", batch_size=1)
    out = tmp_path / "killed"
    command = [
        "tokenize",
        "encode-shards",
        str(tmp_path / "tars"),
        "--codebook",
        str(chain.codebook),
        "--out",
        str(out),
    ]
    start = [
        sys.executable,
        "-c",
        "from mapet.cli import main; main()",
        *command,
        "--batch-size",
        "1",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out / "shards/t01.json", process, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / "shards/t01.json").exists()
    assert not (out / "manifest.json").exists(), "it had ended before it was killed"
    before = times_of(out)
    ran = subprocess.run(start, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert files_of(out) == files_of(tmp_path / "whole")
    assert times_of(out)["shards/t00.zarr.zip"] == before["shards/t00.zarr.zip"]
    assert "of 12 shards are whole already" in ran.stderr
