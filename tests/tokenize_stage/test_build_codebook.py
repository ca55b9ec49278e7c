"""build-codebook gives FAISS's own k-means of the sampled features, repeatably, and refuses what cannot be."""

import io
import os
import shutil
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from mapet.shared.errors import DataError, UsageError
from mapet.shared.images.decode import read_image
from mapet.shared.images.views import center_view, to_array
from mapet.shared.sources.sources import read_records
from mapet.shared.storage.files import read_sealed_json, write_sealed_json
from mapet.shared.tokens.code_usage import usage
from mapet.shared.tokens.codebook import Codebook
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.kmeans.patch_sample import PatchSample, draw_sample
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import Tower, TowerSettings
from mapet.tokenize_stage.verify import verify
from PIL import Image

from ..warm import processes_of, warm_command, warm_torchrun

K = 12
FAST = {"k": K, "iterations": 6, "restarts": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def built(chain, tower: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "book"
    build_codebook(chain.images, out, tower=tower, **FAST)
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("codebook.json", "centroids.safetensors")}


def features_of(chain, tower: str, batch_size: int) -> tuple[list[str], np.ndarray]:
    """All patch features of all images, in the source's order, in batches as the command makes them."""
    opened = open_tower(TowerSettings(tower))
    records = read_records(chain.images)
    pixels = torch.stack(
        [torch.from_numpy(to_array(center_view(read_image(record)[0], opened.preprocess))) for record in records]
    )
    features = torch.cat([opened.features(batch) for batch in pixels.split(batch_size)])
    return [record.key for record in records], features.numpy()


def sampled_rows(sample: PatchSample, keys: list[str], features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All sampled features in the order of their draws, rounded to fp16, and those of them that train."""
    picks = [sample.of_image(key) for key in keys]
    draws = np.concatenate([drawn for _, drawn in picks])
    rows = np.concatenate([image[patches] for image, (patches, _) in zip(features, picks, strict=True)])
    rows = rows[np.argsort(draws)].astype(np.float16).astype(np.float32)
    return rows, rows[: (draws <= np.uint64(sample.most_train)).sum()]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_codebook_is_that_of_bare_faiss_on_the_same_rows(chain, tower: str, tmp_path: Path, metric: str):
    book = build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, metric=metric)
    keys, features = features_of(chain, tower, batch_size=32)
    if metric == "cosine":
        features /= np.linalg.norm(features, axis=2, keepdims=True)
    total = features.shape[0] * features.shape[1]
    held_out = int(total * 0.05)
    sample = draw_sample(keys, features.shape[1], total - held_out, held_out, seed=0)
    rows, train = sampled_rows(sample, keys, features)
    bare = faiss.Kmeans(
        32, K, niter=6, nredo=2, seed=0, max_points_per_centroid=len(train), spherical=metric == "cosine"
    )
    bare.train(train)
    assert book.description["sample"]["patches"] == len(train) > 256 * K
    assert book.description["sample"]["held_out"] == held_out == len(rows) - len(train)
    assert np.allclose(book.centroids, bare.centroids, rtol=1e-4, atol=1e-5)
    about = book.description
    best = about["objective"][about["best_restart"]]
    assert best == pytest.approx([step["obj"] for step in bare.iteration_stats][-len(best) :], rel=1e-5)
    index = faiss.IndexFlatL2(32)
    index.add(bare.centroids)
    assert np.array_equal(book.counts, np.bincount(index.search(train, 1)[1][:, 0], minlength=K))
    distances, nearest = index.search(rows[len(train) :], 1)
    about = book.description["held_out"]
    assert about["mean_squared_distance"] == pytest.approx(distances.mean(), rel=1e-4)
    expected = usage(np.bincount(nearest[:, 0], minlength=K))
    assert {name: about[name] for name in expected} == pytest.approx(expected)


def test_the_same_request_gives_the_same_bytes(chain, built: Path, tower: str, tmp_path: Path):
    build_codebook(chain.images, tmp_path / "again", tower=tower, **FAST)
    assert bytes_of(tmp_path / "again") == bytes_of(built)


def test_worker_processes_do_not_change_a_byte(chain, built: Path, tower: str, tmp_path: Path):
    build_codebook(chain.images, tmp_path / "workers", tower=tower, **FAST, workers=2)
    assert bytes_of(tmp_path / "workers") == bytes_of(built)


@pytest.mark.parametrize("batch_size", [5, 32])
def test_the_batch_size_changes_neither_sample_nor_centroids_beyond_rounding(
    chain, built: Path, tower: str, tmp_path: Path, batch_size: int
):
    other = build_codebook(chain.images, tmp_path / "other", tower=tower, **FAST, batch_size=batch_size)
    book = Codebook.load(built)
    assert other.description["sample"] == book.description["sample"]
    # Kernels round differently for another batch size; nothing else may differ.
    assert np.allclose(other.centroids, book.centroids, rtol=1e-3, atol=1e-4)


def test_the_order_of_the_tars_changes_neither_sample_nor_centroids(chain, built: Path, tower: str, tmp_path: Path):
    other = build_codebook(chain.tars[::-1], tmp_path / "other", tower=tower, **FAST)
    assert np.allclose(other.centroids, Codebook.load(built).centroids, rtol=1e-3, atol=1e-4)


def test_another_seed_gives_another_codebook(chain, built: Path, tower: str, tmp_path: Path):
    other = build_codebook(chain.images, tmp_path / "other", tower=tower, **FAST, seed=1)
    assert other.fingerprint != Codebook.load(built).fingerprint


def test_the_objective_never_rises_in_any_restart(built: Path):
    runs = Codebook.load(built).description["objective"]
    assert len(runs) == 2
    for run in runs:
        assert 2 <= len(run) <= 6  # fewer where nothing changed any more
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(run))


def test_cosine_gives_unit_centroids_and_a_rising_objective(chain, tower: str, tmp_path: Path):
    book = build_codebook(chain.images, tmp_path / "cosine", tower=tower, **FAST, metric="cosine")
    assert np.allclose(np.linalg.norm(book.centroids, axis=1), 1, atol=1e-5)
    run = book.description["objective"][-1]
    assert all(after >= before * (1 - 1e-6) for before, after in pairwise(run))
    assert book.description["metric"] == "cosine"
    # Mean squared distance of unit vectors is 2 - 2 cosine, and the objective their summed cosine.
    training = book.description["training"]["mean_squared_distance"]
    assert 0 < training < 2 - 2 * run[-1] / book.description["sample"]["patches"] + 1e-4


def test_the_result_returned_is_the_one_on_disk_and_says_how_it_was_made(chain, tower: str, tmp_path: Path):
    book = build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, patches=500, max_images=20, layer=0)
    loaded = Codebook.load(tmp_path / "book")
    assert loaded.fingerprint == book.fingerprint
    assert loaded.description == book.description
    about = loaded.description
    assert (about["tower"], about["layer"], about["k"], about["seed"]) == (tower, 0, K, 0)
    assert (about["sample"]["images"], about["sample"]["patches"]) == (20, 500)
    assert loaded.counts.sum() == 500
    assert about["grid"] == [8, 8]
    assert sorted(path.name for path in (tmp_path / "book").iterdir()) == [
        "centroids.safetensors",
        "codebook.json",
        "timings.json",
    ]
    assert os.listdir(tmp_path) == ["book"]


def test_a_second_call_with_the_same_request_returns_at_once(chain, built: Path, tower: str):
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    began = time.monotonic()
    again = build_codebook(chain.images, built, tower=tower, **FAST, batch_size=7)
    assert time.monotonic() - began < 2
    assert again.fingerprint == Codebook.load(built).fingerprint
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"k": 13}, {"layer": 0}, {"metric": "cosine"}, {"patches": 100}, {"max_images": 50}],
)
def test_a_second_call_with_another_request_is_a_usage_error_that_names_it(
    chain, built: Path, tower: str, change: dict
):
    name = "keys_sha256" if "max_images" in change else next(iter(change))
    with pytest.raises(UsageError, match=rf"already holds a codebook made with other settings \({name}\)"):
        build_codebook(chain.images, built, **{"tower": tower, **FAST, **change})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"k": 6000},
            r"--k 6000 is larger than the sample: 96 images x 64 patches, less 307 .* 5837 patches",
        ),
        ({"k": 20, "patches": 19}, "--k 20 is larger than the sample"),
        ({"k": 70, "max_images": 1}, "--k 70 is larger than the sample: 1 images"),
    ],
)
def test_more_codes_than_patches_are_a_data_error_with_the_arithmetic(
    chain, tower: str, tmp_path: Path, more: dict, message: str
):
    with pytest.raises(DataError, match=message):
        build_codebook(chain.images, tmp_path / "book", **{"tower": tower, **FAST, **more})
    assert not os.listdir(tmp_path)


def broken(folder: Path, write_tar) -> Path:
    return write_tar(folder / "bad.tar", [("good.jpg", b"\xff\xd8 not a picture")])


def test_a_broken_image_leaves_no_codebook_and_what_was_extracted_is_kept(
    chain, built: Path, tower: str, tmp_path: Path, write_tar
):
    sources, out = [*chain.tars, broken(tmp_path, write_tar)], tmp_path / "book"
    with pytest.raises(DataError, match=r"bad\.tar: image 'good'"):
        build_codebook(sources, out, tower=tower, **FAST, workers=2)
    assert sorted(os.listdir(tmp_path)) == [".book.work", "bad.tar"]
    parts = sorted(path.name for path in (tmp_path / ".book.work" / "features").glob("part-*"))
    assert parts == [f"part-{tar.stem}" for tar in chain.tars]
    # Other images are another sample: what was kept is not mixed with it.
    build_codebook(chain.images, out, tower=tower, **FAST)
    assert bytes_of(out) == bytes_of(built)
    assert sorted(os.listdir(tmp_path)) == ["bad.tar", "book"]


def test_with_skip_a_broken_image_is_left_out_counted_and_listed(
    chain, built: Path, tower: str, tmp_path: Path, write_tar, capsys
):
    sources, out = [*chain.tars, broken(tmp_path, write_tar)], tmp_path / "book"
    book = build_codebook(sources, out, tower=tower, **FAST, on_error="skip")
    about = book.description["sample"]
    assert about["images"] == 96
    [[key, reason]] = about["skipped"]
    assert key == "good"
    assert "bad.tar" in reason
    assert str(tmp_path) not in reason
    assert "1, the first is good: " in capsys.readouterr().out
    # 97 images were drawn from; of those of the broken one none is there.
    assert about["patches"] + about["held_out"] < 97 * 64
    assert book.counts.sum() == about["patches"]
    assert Codebook.load(built).description["sample"]["skipped"] == []


def test_nothing_that_can_be_read_is_a_data_error(tower: str, tmp_path: Path, write_tar):
    with pytest.raises(DataError, match="None of the sampled images could be read"):
        build_codebook(broken(tmp_path, write_tar), tmp_path / "book", tower=tower, **FAST, on_error="skip")


@pytest.fixture(scope="module")
def cache(chain, tower: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    build_codebook(chain.images, folder / "book", tower=tower, **FAST, features_cache=folder / "features")
    return folder / "features"


def test_a_features_cache_changes_nothing_and_is_kept(cache: Path, built: Path):
    assert bytes_of(cache.parent / "book") == bytes_of(built)
    assert sorted(os.listdir(cache.parent)) == ["book", "features"]
    assert sorted(os.listdir(cache)) == ["draws.npy", "features.f16", "sample.json"]


def test_with_a_features_cache_another_k_and_a_smaller_sample_need_no_extraction(
    chain, cache: Path, tower: str, tmp_path: Path, monkeypatch
):
    again = {"tower": tower, **FAST, "k": 9, "patches": 3000}
    fresh = build_codebook(chain.images, tmp_path / "fresh", **again)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    monkeypatch.setattr(Tower, "features", None)
    build_codebook(chain.images, tmp_path / "cached", **again, features_cache=cache)
    assert bytes_of(tmp_path / "cached") == bytes_of(tmp_path / "fresh")
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert fresh.description["sample"]["patches"] == 3000
    assert sorted(os.listdir(tmp_path)) == ["cached", "fresh"]


def test_a_features_cache_of_a_smaller_sample_is_filled_again(chain, built: Path, tower: str, tmp_path: Path, capsys):
    cache = tmp_path / "features"
    build_codebook(chain.images, tmp_path / "small", tower=tower, **FAST, patches=2000, features_cache=cache)
    build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, features_cache=cache)
    assert "smaller sample" in capsys.readouterr().err
    assert bytes_of(tmp_path / "book") == bytes_of(built)


@pytest.mark.parametrize(
    ("change", "name"), [({"layer": 0}, "layer"), ({"metric": "cosine"}, "metric"), ({"seed": 3}, "seed")]
)
def test_a_cache_of_other_features_is_refused_by_name(
    chain, cache: Path, tower: str, tmp_path: Path, change: dict, name: str
):
    with pytest.raises(DataError, match=rf"holds other features \({name} .+\) than this command needs \({name} "):
        build_codebook(chain.images, tmp_path / "book", **{"tower": tower, **FAST, **change}, features_cache=cache)
    assert len(os.listdir(cache)) == 3


def test_a_cache_of_other_images_or_another_tower_is_refused(
    chain, cache: Path, tower: str, resnet_tower: str, tmp_path: Path
):
    with pytest.raises(DataError, match="keys_sha256"):
        build_codebook(chain.tars[:2], tmp_path / "book", tower=tower, **FAST, features_cache=cache)
    with pytest.raises(DataError, match="weights_sha256"):
        build_codebook(chain.images, tmp_path / "book", tower=resnet_tower, **FAST, features_cache=cache)


def test_a_folder_that_is_no_features_cache_is_not_touched(chain, tower: str, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(UsageError, match="not empty and not a features cache"):
        build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, features_cache=tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_a_cache_that_was_written_under_the_old_id_still_opens(
    chain, cache: Path, built: Path, tower: str, tmp_path: Path, monkeypatch
):
    """The id was once that of another artifact, the features that `mapet train features` writes."""
    sheet = read_sealed_json(cache / "sample.json", format="mapet-feature-cache", version=1)
    old = Path(shutil.copytree(cache, tmp_path / "old"))
    write_sealed_json(old / "sample.json", {**sheet, "format": "mapet-features"})
    before = (old / "sample.json").read_bytes()
    monkeypatch.setattr(Tower, "features", None)
    build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, features_cache=old)
    assert bytes_of(tmp_path / "book") == bytes_of(built)
    assert (old / "sample.json").read_bytes() == before
    write_sealed_json(old / "sample.json", {**sheet, "format": "mapet-run"})
    with pytest.raises(DataError, match=r"sample\.json is not a mapet-feature-cache"):
        build_codebook(chain.images, tmp_path / "other", tower=tower, **FAST, features_cache=old)


def test_a_damaged_features_cache_is_refused(chain, cache: Path, tower: str, tmp_path: Path):
    damaged = Path(shutil.copytree(cache, tmp_path / "damaged"))
    with open(damaged / "features.f16", "ab") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=r"is damaged .* delete it"):
        build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, features_cache=damaged)


def test_features_beyond_fp16_are_a_data_error(chain, tower: str, tmp_path: Path, monkeypatch):
    normal = Tower.features
    monkeypatch.setattr(Tower, "features", lambda self, pixels: normal(self, pixels) * 1e6)
    with pytest.raises(DataError, match=r"do not fit into fp16 \(up to .+\); use --metric cosine"):
        build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST)
    build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, metric="cosine")


def test_the_same_patches_everywhere_are_too_few_distinct_ones(tower: str, tmp_path: Path, write_tar):
    one = png(np.full((64, 64, 3), 90, dtype=np.uint8))
    write_tar(tmp_path / "grey.tar", [(f"{number}.png", one) for number in range(4)])
    with pytest.raises(DataError, match=r"--k 100 is more than the \d+ distinct features among the \d+ patches"):
        build_codebook(tmp_path / "grey.tar", tmp_path / "book", tower=tower, **FAST | {"k": 100})


def test_a_codebook_made_under_little_memory_is_the_same(chain, built: Path, tower: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"--memory 100 kB is too little"):
        build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, memory="100kB")
    assert not os.listdir(tmp_path)
    build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, memory="1GB")
    assert bytes_of(tmp_path / "book") == bytes_of(built)


@pytest.mark.parametrize(
    ("bad", "message"), [({"memory": "much"}, "--memory much"), ({"on_error": "cry"}, "--on-error")]
)
def test_options_that_cannot_be_are_usage_errors(chain, tower: str, tmp_path: Path, bad: dict, message: str):
    with pytest.raises(UsageError, match=message):
        build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, **bad)


def mapet_under_torchrun(processes: int, *arguments: object) -> subprocess.Popen:
    launch = [*warm_torchrun(), "--standalone", "--nproc-per-node", str(processes)]
    command = ["--no-python", *warm_command(), *map(str, arguments)]
    return subprocess.Popen([*launch, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_with_children(process: subprocess.Popen, out: Path) -> None:
    for number in (process.pid, *processes_of(out)):
        os.kill(number, signal.SIGKILL)
    process.communicate()


def options(tower: str, out: Path) -> list:
    numbers = ["--k", K, "--iterations", FAST["iterations"], "--restarts", FAST["restarts"]]
    return ["--tower", tower, "--out", out, "--device", "cpu", *numbers]


def test_two_processes_make_the_bytes_of_one(chain, built: Path, tower: str, tmp_path: Path):
    out = tmp_path / "book"
    process = mapet_under_torchrun(2, "tokenize", "build-codebook", chain.images, *options(tower, out))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert bytes_of(out) == bytes_of(built)
    assert os.listdir(tmp_path) == ["book"]
    assert output.count("fingerprint") == 1


def test_one_process_goes_on_where_two_were_killed_and_makes_the_same_bytes(
    tower: str, tmp_path: Path, write_tar, monkeypatch
):
    """Killed once a few of twenty shards are extracted: they are kept, the others are not extracted twice."""
    random, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    for shard in range(20):
        names = (f"{shard}-{number}.png" for number in range(20))
        pixels = random.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
        write_tar(images / f"{shard:02d}.tar", [(name, png(one)) for name, one in zip(names, pixels, strict=True)])
    out, features = tmp_path / "book", tmp_path / ".book.work" / "features"
    process = mapet_under_torchrun(2, "tokenize", "build-codebook", images, *options(tower, out), "--batch-size", 4)
    until = time.monotonic() + 100
    while not list(features.glob("part-*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    kill_with_children(process, out)
    kept = len(list(features.glob("part-*")))
    assert 1 <= kept < 20
    normal, calls = Tower.features, []
    monkeypatch.setattr(Tower, "features", lambda self, pixels: calls.append(1) or normal(self, pixels))
    build_codebook(images, out, tower=tower, **FAST, batch_size=4)
    assert len(calls) == (20 - kept) * 20 // 4
    assert sorted(os.listdir(tmp_path)) == ["book", "images"]
    build_codebook(images, tmp_path / "fresh", tower=tower, **FAST, batch_size=4)
    assert bytes_of(out) == bytes_of(tmp_path / "fresh")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_any_timm_backbone_makes_a_codebook_and_tokens_with_the_same_two_commands(
    chain, effnet_file: Path, tmp_path: Path
):
    """ImageNet's EfficientNet-Lite0, stride 16: 8x8 tokens of a 128 px image."""
    backbone = {"tower": "timm:tf_efficientnet_lite0", "pretrained": str(effnet_file), "image_size": 128, "layer": 3}
    book = build_codebook(chain.tars[0], tmp_path / "book", **backbone, **FAST)
    assert (book.grid, book.description["dim"]) == ((8, 8), 112)
    store = encode_shards(chain.tars[0], tmp_path / "book", tmp_path / "tokens", batch_size=16)
    assert verify(tmp_path / "tokens", codebook=tmp_path / "book", images=str(chain.tars[0]), reencode=8) == 32
    counts = np.bincount(np.concatenate([rows.tokens.reshape(-1) for _, rows in store.shards()]), minlength=K)
    assert (counts > 0).sum() > K / 2
