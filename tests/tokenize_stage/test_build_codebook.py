"""build-codebook gives FAISS's own k-means of the sampled features, repeatably, and refuses what cannot be."""

import os
import time
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from mapet.shared.codebook import Codebook, usage
from mapet.shared.errors import DataError, UsageError
from mapet.shared.images import read_image
from mapet.shared.sources import read_records
from mapet.shared.views import center_view, to_array
from mapet.tokenize_stage.build_codebook import KMeansSettings, build_codebook
from mapet.tokenize_stage.sample import draw_sample
from mapet.tokenize_stage.towers import TowerSettings, open_tower

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


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_codebook_is_that_of_bare_faiss_on_the_same_rows(chain, tower: str, tmp_path: Path, metric: str):
    book = build_codebook(chain.images, tmp_path / "book", tower=tower, **FAST, metric=metric)
    keys, features = features_of(chain, tower, batch_size=32)
    if metric == "cosine":
        features /= np.linalg.norm(features, axis=2, keepdims=True)
    total = features.shape[0] * features.shape[1]
    held_out = int(total * 0.05)
    sample = draw_sample(keys, features.shape[1], total - held_out, held_out, seed=0)
    rows = np.empty((len(sample), features.shape[2]), dtype=np.float32)
    rows[sample.row] = features[sample.image, sample.patch]
    train = rows[: sample.train]
    bare = faiss.Kmeans(
        32, K, niter=6, nredo=2, seed=0, max_points_per_centroid=len(train), spherical=metric == "cosine"
    )
    bare.train(train)
    assert book.description["sample"]["patches"] == len(train) > 256 * K
    assert book.description["sample"]["held_out"] == held_out == len(rows) - len(train)
    assert np.allclose(book.centroids, bare.centroids, rtol=1e-4, atol=1e-5)
    assert book.description["objective"][-1] == pytest.approx([step["obj"] for step in bare.iteration_stats][-6:])
    index = faiss.IndexFlatL2(32)
    index.add(bare.centroids)
    assert np.array_equal(book.counts, np.bincount(index.search(train, 1)[1][:, 0], minlength=K))
    distances, nearest = index.search(rows[sample.train :], 1)
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
    assert 1 <= len(runs) <= 2
    for run in runs:
        assert len(run) == 6
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


@pytest.mark.parametrize(
    ("bad", "option"),
    [
        ({"k": 1}, "--k 1"),
        ({"k": 65_537}, "--k 65537"),
        ({"iterations": 0}, "--iterations"),
        ({"restarts": 0}, "--restarts"),
        ({"metric": "l1"}, "--metric l1"),
    ],
)
def test_impossible_settings_are_usage_errors_that_name_the_option(bad: dict, option: str):
    with pytest.raises(UsageError, match=option):
        KMeansSettings(**bad)


def test_a_broken_image_leaves_no_codebook(chain, tower: str, tmp_path: Path, write_tar):
    write_tar(tmp_path / "bad.tar", [("good.jpg", b"\xff\xd8 not a picture")])
    with pytest.raises(DataError, match=r"bad\.tar: image 'good'"):
        build_codebook([*chain.tars, tmp_path / "bad.tar"], tmp_path / "book", tower=tower, **FAST, workers=2)
    assert os.listdir(tmp_path) == ["bad.tar"]
