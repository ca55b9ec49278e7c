"""encode-shards: the right tokens, the same bytes however it runs, and nothing half done under a final name."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import time
import zlib
from pathlib import Path

import faiss
import numpy as np
import open_clip
import pytest
import torch
from mapet.shared.errors import DataError, FingerprintMismatch, UsageError
from mapet.shared.images.decode import read_image
from mapet.shared.images.views import Preprocess, ViewPolicy, center_box
from mapet.shared.sources.records import read_bytes
from mapet.shared.sources.sources import open_source, read_records
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import NO_LABEL, ShardRows
from mapet.shared.tokens.store import TokenStore, read_entry, write_shard
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards, encode_shards_dry_run, show_estimate
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import TowerSettings
from mapet.tokenize_stage.verify import verify
from PIL import Image

from ..warm import warm_command, warm_torchrun


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


@pytest.mark.campaign
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_tower_gives_the_same_tokens_up_to_ties(chain, tmp_path: Path, capsys):
    encode_shards(chain.images, chain.codebook, tmp_path / "tokens", compile=True)
    assert "leave --compile out" in capsys.readouterr().err
    found, expected = (np.stack(list(tokens_by_key(store).values())) for store in (tmp_path / "tokens", chain.tokens))
    assert np.mean(found == expected) > 0.995
    verify(tmp_path / "tokens", codebook=chain.codebook, images=chain.images, reencode=96)


def test_a_tower_is_not_compiled_without_a_compiler(chain, tower: str, tmp_path: Path, monkeypatch):
    for name in ("PATH", "CC", "CXX"):
        monkeypatch.setenv(name, "")
    with pytest.raises(UsageError, match=r"--compile needs a C\+\+ compiler"):
        encode_shards(chain.images, chain.codebook, tmp_path / "tokens", compile=True)
    with pytest.raises(UsageError, match=r"--compile needs a C\+\+ compiler"):
        build_codebook(chain.images, tmp_path / "codebook", tower=tower, k=4, patches=50, compile=True)
    assert not (tmp_path / "codebook").exists()
    assert not any((tmp_path / "tokens").glob("*.zip"))


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
    assert rows.classes == tuple(classes)
    assert [rows.label(row) for row in range(len(rows))] == [key.partition("/")[0] for key in rows.keys]
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
    with pytest.raises(UsageError, match="is not empty and not a token store"):
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


# Several views


RANDOM = {"crop": "random-resized", "scale": (0.3, 1.0), "flip": 0.5, "seed": 4}


@pytest.fixture(scope="module")
def four(chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the chain's images with four views, the first one centred."""
    out = tmp_path_factory.mktemp("views") / "four"
    encode_shards(chain.images, chain.codebook, out, batch_size=16, views=4, with_center=True, **RANDOM)
    return out


def test_every_view_holds_the_tokens_of_its_own_crop(chain, tower: str, four: Path):
    """Each stored box and flip, cut out of the source by hand, gives the stored tokens."""
    policy = ViewPolicy.from_json(TokenStore(four).view)
    book, opened = Codebook.load(chain.codebook), open_tower(TowerSettings(tower))
    flips = 0
    for shard, (_, rows) in zip(open_source(chain.images), all_rows(four), strict=True):
        for at, record in list(enumerate(shard.index()))[::8]:
            image, _ = read_image(record)
            for view in range(1, 4):
                box, flip = policy.draw(record.key, view, *image.size)
                assert (tuple(rows.crops[at, view]), bool(rows.flips[at, view])) == (tuple(box), flip)
                corners = (box.left, box.top, box.left + box.width, box.top + box.height)
                crop = image.resize((64, 64), Image.Resampling.BICUBIC, box=corners)
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
                pixels = torch.from_numpy(np.asarray(crop).transpose(2, 0, 1).copy())
                found, _ = book.assign(opened.features(pixels[None])[0].numpy())
                assert np.array_equal(found.reshape(8, 8), rows.tokens[at, view])
                flips += flip
    assert 0 < flips < 36


def test_view_0_can_be_the_centre_view(chain, four: Path):
    for (_, rows), (_, centre) in zip(all_rows(four), all_rows(chain.tokens), strict=True):
        for name in ("tokens", "crops", "flips"):
            assert np.array_equal(getattr(rows, name)[:, :1], getattr(centre, name))
        assert all(len({tokens.tobytes() for tokens in views}) > 1 for views in rows.tokens)


def test_views_added_later_give_the_same_bytes_and_keep_what_was_there(chain, four: Path, tmp_path: Path):
    out = tmp_path / "tokens"
    encode_shards(chain.images, chain.codebook, out, batch_size=16, views=1, with_center=True, **RANDOM)
    # A token that the tower would not give shows whether the old views are kept or computed again.
    name, rows = all_rows(out)[1]
    entry = read_entry(out, name)
    rows.tokens[3, 0, 0, 0] = (rows.tokens[3, 0, 0, 0] + 1) % book_size(chain)
    write_shard(out, name, rows, {key: entry[key] for key in ("codebook_fingerprint", "view", "source", "skipped")})
    encode_shards(chain.images, chain.codebook, out, batch_size=16, views=4, with_center=True, **RANDOM)
    first, second = dict(all_rows(four))[name], dict(all_rows(out))[name]
    assert np.argwhere(first.tokens != second.tokens).tolist() == [[3, 0, 0, 0]]
    names = [path for path, data in files_of(out).items() if data != files_of(four)[path]]
    assert sorted(names) == sorted(["manifest.json", f"shards/{name}.json", f"shards/{name}.zarr.zip"])
    assert files_of(out).keys() == files_of(four).keys()


def book_size(chain) -> int:
    return TokenStore(chain.tokens).k


def test_a_store_whose_views_were_half_added_says_so_and_goes_on(chain, four: Path, source: Path, tmp_path: Path):
    out = tmp_path / "tokens"
    arguments = {"batch_size": 16, "with_center": True, **RANDOM}
    encode_shards(source, chain.codebook, out, views=2, **arguments)
    tar = sorted(source.glob("*.tar"))[1]
    whole = tar.read_bytes()
    damaged = bytearray(whole)
    start = open_source(tar)[0].index()[3].offset
    damaged[start : start + 100] = bytes(100)
    tar.write_bytes(damaged)
    with pytest.raises(DataError, match=tar.name):
        encode_shards(source, chain.codebook, out, views=4, **arguments)
    with pytest.raises(DataError, match="did not finish; give the same encode-shards command again"):
        TokenStore(out)
    tar.write_bytes(whole)
    encode_shards(source, chain.codebook, out, views=4, **arguments)
    assert files_of(out) == files_of(four)


def test_other_or_fewer_views_than_a_store_has_are_refused(chain, four: Path):
    before = files_of(four)
    with pytest.raises(UsageError, match="holds 4 views already"):
        encode_shards(chain.images, chain.codebook, four, views=3, with_center=True, **RANDOM)
    for other in ({"seed": 5}, {"flip": 0.1}, {"scale": (0.2, 1.0)}):
        with pytest.raises(FingerprintMismatch, match="encoded with other settings"):
            encode_shards(chain.images, chain.codebook, four, views=4, with_center=True, **{**RANDOM, **other})
    with pytest.raises(FingerprintMismatch, match="encoded with other settings"):
        encode_shards(chain.images, chain.codebook, four)
    assert files_of(four) == before


def test_views_are_added_to_all_shards_of_a_store_or_to_none(chain, tmp_path: Path):
    out = tmp_path / "tokens"
    encode_shards(chain.tars, chain.codebook, out, batch_size=16, views=1, **RANDOM)
    before = files_of(out)
    with pytest.raises(UsageError, match=f"also holds shard {chain.tars[1].stem}, with other views"):
        encode_shards(chain.tars[:1], chain.codebook, out, batch_size=16, views=2, **RANDOM)
    assert files_of(out) == before
    # A store that lost its manifest still knows all of its shards.
    (out / "manifest.json").unlink()
    encode_shards(chain.tars[:1], chain.codebook, out, batch_size=16, views=1, **RANDOM)
    assert files_of(out) == before


def test_a_dry_run_says_hours_bytes_and_rows_and_writes_nothing(chain, tmp_path: Path, capsys):
    out = tmp_path / "tokens"
    estimate = encode_shards_dry_run(chain.images, chain.codebook, out, views=2, crop="random-resized")
    assert not out.exists()
    assert capsys.readouterr().out == ""
    show_estimate(estimate)
    printed = " ".join(capsys.readouterr().out.split())
    assert "96 images x 2 views in 3 shards" in printed
    encode_shards(chain.images, chain.codebook, out, views=2, crop="random-resized", batch_size=8)
    stated = int(re.search(r"bytes │ ([\d,]+)", printed).group(1).replace(",", ""))
    written = sum(entry["bytes"] for entry in TokenStore(out).entries.values())
    assert stated == estimate.bytes == pytest.approx(written, rel=0.5)


def test_a_dry_run_where_nothing_is_left_estimates_zero(chain, capsys):
    estimate = encode_shards_dry_run(chain.images, chain.codebook, chain.tokens)
    assert (estimate.shards, estimate.images, estimate.seconds, estimate.bytes) == (0, 0, 0.0, 0)
    capsys.readouterr()
    show_estimate(estimate)
    assert "nothing is left to do" in capsys.readouterr().err


def test_a_dry_run_counts_what_is_left_only(chain, store: Path):
    (store / f"shards/{chain.tars[1].stem}.json").unlink()
    before = files_of(store)
    estimate = encode_shards_dry_run(chain.images, chain.codebook, store, batch_size=8)
    assert (estimate.shards, estimate.images, estimate.views, estimate.processes) == (1, 32, 1, 1)
    assert estimate.batches == 3
    assert estimate.seconds == pytest.approx(32 / estimate.images_per_second)
    assert files_of(store) == before


# Many processes


def mapet_under_torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    launch = [*warm_torchrun(), "--nproc-per-node", str(processes), "--no-python"]
    command = [*warm_command(), *map(str, arguments)]
    port = ["--master-port", str(free_port())]
    return subprocess.run([*launch, *port, *command], capture_output=True, text=True, timeout=120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_write_the_same_bytes_as_one(chain, tmp_path: Path):
    out = tmp_path / "tokens"
    options = ["--codebook", chain.codebook, "--out", out, "--batch-size", 16, "--device", "cpu"]
    result = mapet_under_torchrun(2, "tokenize", "encode-shards", chain.images, *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Token store") == 1
    assert files_of(out) == files_of(chain.tokens)
    # One process goes on with what two have begun.
    for victim in ("manifest.json", "shards/train-000001.json"):
        (out / victim).unlink(missing_ok=True)
    encode_shards(chain.images, chain.codebook, out, batch_size=16)
    assert files_of(out) == files_of(chain.tokens)


def test_an_error_in_a_many_process_run_is_one_sentence(chain, tmp_path: Path, tower: str):
    options = ["--codebook", tmp_path / "nowhere", "--out", tmp_path / "tokens"]
    result = mapet_under_torchrun(2, "tokenize", "encode-shards", chain.images, *options)
    assert result.returncode != 0
    assert result.stderr.count("mapet: ") == 1
    assert "nowhere does not exist" in result.stderr
    assert not (tmp_path / "tokens").exists()


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
        write_tar(tmp_path / f"tars/t{number:02d}.tar", [(f"{number}-{name}", data) for name, data in members[:25]])
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
    start = [*warm_command(), *command, "--batch-size", "1", "--device", "cpu"]
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
