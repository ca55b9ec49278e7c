"""Situations of more than 65,536 codes, whose tokens are uint32."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mapet.quickstart.drawings import write_drawings
from mapet.shared.storage.files import write_sealed_json
from mapet.shared.tokens.rows import ShardRows
from mapet.shared.tokens.shard_files import read_shard, write_shard
from mapet.shared.tokens.store import TokenStore, read_entry, write_manifest

K = 70_000
TOWER = ("--tower", "pixels:2", "--image-size", 16)
"""8x8 patches of 12 numbers."""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two tars of six drawings."""
    folder = tmp_path_factory.mktemp("drawings") / "images"
    write_drawings(folder, 12, seed=5, per_tar=6)
    return folder


@pytest.fixture(scope="module")
def book(mapet, tmp_path_factory) -> Path:
    """A codebook of 70,000 imported centroids; only the last 100 are where patches are."""
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    centroids = np.full((K, 12), 100, np.float32)
    centroids[:, 0] += np.arange(K) / K
    centroids[-100:] = random.normal(0, 1, (100, 12))
    np.save(folder / "centroids.npy", centroids)
    options = ("--centroids", folder / "centroids.npy", *TOWER)
    mapet("tokenize", "import", *options, "--out", folder / "codebook").ok()
    return folder / "codebook"


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def store(mapet, images, book, tmp_path_factory, request) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "tokens"
    words = ("--codebook", book, "--out", out, "--format", request.param)
    mapet("tokenize", "encode-shards", images, *words).ok()
    return out


def test_the_store_states_the_type_of_its_tokens(mapet, lab, store):
    """The manifest and every shard of a store of K = 70,000 state uint32; those of smaller stores state nothing."""
    opened = TokenStore(store)
    assert (opened.k, opened.dtype, opened.manifest["dtype"]) == (K, "uint32", "uint32")
    assert {entry["dtype"] for entry in opened.entries.values()} == {"uint32"}
    tokens = opened.to_numpy()
    assert tokens.dtype == np.uint32
    assert tokens.min() >= K - 100
    assert len(np.unique(tokens)) > 10
    small = TokenStore(lab.tokens)
    assert "dtype" not in small.manifest
    assert not any("dtype" in entry for entry in small.entries.values())


def test_tokens_of_many_codes_are_verified_and_inspected(mapet, images, book, store, tmp_path):
    """verify, encoding again, inspect with a page, and a comparison of a store with itself."""
    options = ("--codebook", book, "--images", images, "--reencode", 5)
    assert "0 differ" in mapet("tokenize", "verify", store, *options).ok().text
    page = tmp_path / "page.html"
    pictures = [] if TokenStore(store).holds_images else ["--images", images]
    mapet("tokenize", "inspect", store, "--html", page, *pictures, "--codebook", book).ok()
    report = json.loads(mapet("tokenize", "inspect", store, "--against", store, "--json").ok().stdout)
    assert len(report["counts"]) == K
    assert sum(report["counts"]) == 12 * 64
    assert report["against"]["tokens"]["share"] == 1
    key = next(iter(TokenStore(store)))
    image = json.loads(mapet("tokenize", "inspect", store, "--key", key, "--json").ok().stdout)["image"]
    assert image["views"][0]["tokens"] == TokenStore(store)[key].tokens[0].tolist()


def test_views_are_added_to_a_store_of_many_codes(mapet, images, book, tmp_path):
    """One view, then two: the stored one stays."""
    words = ("--codebook", book, "--out", tmp_path / "tokens", "--crop", "random-resized")
    mapet("tokenize", "encode-shards", images, *words, "--views", 1).ok()
    before = TokenStore(tmp_path / "tokens").to_numpy()
    mapet("tokenize", "encode-shards", images, *words, "--views", 2).ok()
    after = TokenStore(tmp_path / "tokens").to_numpy()
    assert (after.dtype, after.shape) == (np.uint32, (12, 2, 8, 8))
    assert np.array_equal(before, after[:, :1])


def test_tokens_of_many_codes_are_imported(mapet, images, book, store, tmp_path):
    """Tokens in int64 become the store that encoding gives."""
    opened = TokenStore(store)
    np.save(tmp_path / "tokens.npy", opened.to_numpy()[:, 0].astype(np.int64))
    (tmp_path / "list.csv").write_text("key\n" + "\n".join(opened) + "\n")
    options = ("--tokens", tmp_path / "tokens.npy", "--csv", tmp_path / "list.csv", "--images", images)
    mapet("tokenize", "import", *options, "--codebook", book, "--out", tmp_path / "store").ok()
    imported = TokenStore(tmp_path / "store")
    assert np.array_equal(imported.to_numpy(list(opened)), opened.to_numpy())


def test_a_model_of_many_codes_is_trained_resumed_and_exported(mapet, lab, images, store, tmp_path):
    """Pre-training of a tiny model with K = 70,000 outputs, resumed from its first checkpoint, exported, shown."""
    pictures = [] if TokenStore(store).holds_images else ["--images", images]
    run, source = tmp_path / "run", [*pictures, "--tokens", store]
    words = [*source, *lab.settings, "--set", "train.batch_size=4", "--set", "train.checkpoint_every=3", "--out", run]
    mapet("train", "pretrain", *words).ok()
    *_, last = sorted((run / "checkpoints").iterdir())
    weights = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    assert "Resuming" in mapet("train", "pretrain", *words).ok().text
    assert (last / "model.safetensors").read_bytes() == weights
    mapet("train", "export", run, "--out", tmp_path / "export").ok()
    mapet("train", "report", run, "--html", tmp_path / "report.html", *source).ok()


def test_the_dry_run_of_a_model_of_many_codes(mapet, lab, images, zarr_store, tmp_path):
    """The estimate of a pre-training with K = 70,000 outputs."""
    words = ("--images", images, "--tokens", zarr_store, "--set", "train.batch_size=4", "--out", tmp_path / "run")
    assert "K = 70000" in mapet("train", "pretrain", *lab.settings, *words, "--dry-run").ok().text


def changed(tokens: Path, folder: Path, change: Callable[[ShardRows], np.ndarray], **description: object) -> Path:
    """A copy of a store, sealed again, with other tokens in its first shard and other fields in its codebook.json."""
    shutil.copytree(tokens, folder)
    store = TokenStore(folder)
    name, entry = next(iter(store.entries.items()))
    rows = read_shard(folder, entry)
    attributes = {field: entry[field] for field in ("codebook_fingerprint", "view", "source", "skipped")}
    write_shard(folder, name, replace(rows, tokens=change(rows)), attributes)
    write_sealed_json(folder / "codebook.json", store.codebook | description)
    entries = [read_entry(folder, each) for each in store.entries]
    write_manifest(folder, store.codebook | description, entries)
    return folder


def one_bad_token(rows: ShardRows) -> np.ndarray:
    tokens = rows.tokens.astype(np.uint32)
    tokens[2, 0, 1, 1] = K
    return tokens


@pytest.fixture(scope="module")
def zarr_store(mapet, images, book, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("zarr") / "tokens"
    mapet("tokenize", "encode-shards", images, "--codebook", book, "--out", out).ok()
    return out


@pytest.mark.parametrize("command", ["inspect", "verify", "pretrain"])
def test_a_token_of_32_bits_that_is_not_below_k(mapet, lab, images, zarr_store, tmp_path, command):
    """A store of K = 70,000 with token 70000: refused with the image's key."""
    store = changed(zarr_store, tmp_path / "store", one_bad_token)
    key = TokenStore(zarr_store).read_rows(next(iter(TokenStore(zarr_store).entries))).keys[2]
    words = {
        "inspect": ["tokenize", "inspect", store],
        "verify": ["tokenize", "verify", store],
        "pretrain": ["train", "pretrain", "--images", images, "--tokens", store, "--out", tmp_path / "run"],
    }
    settings = lab.settings if command == "pretrain" else []
    mapet(*words[command], *settings).refused(1, repr(key), "token 70000", "K is 70000")


@pytest.mark.parametrize("command", ["inspect", "verify", "pretrain"])
def test_a_shard_of_another_type_than_k_implies(mapet, lab, images, zarr_store, tmp_path, command):
    """A shard of uint16 in a store of K = 70,000: refused by its name."""
    wrong = tmp_path / "wrong"
    changed(zarr_store, wrong, lambda rows: (rows.tokens - 60_000).astype(np.uint16))
    name = next(iter(TokenStore(zarr_store).entries))
    words = {
        "inspect": ["tokenize", "inspect", wrong],
        "verify": ["tokenize", "verify", wrong],
        "pretrain": ["train", "pretrain", "--images", images, "--tokens", wrong, "--out", tmp_path / "run"],
    }
    mapet(*words[command]).refused(1, repr(name), "are uint16", "K = 70000 are uint32")


@pytest.mark.parametrize(("k", "dtype"), [(65_537, None), (65_537, "uint16"), (65_536, "uint32"), (16, "int8")])
def test_a_manifest_of_another_type_than_k_implies(mapet, lab, tmp_path, k, dtype):
    """A manifest that states uint16 at K = 65,537, or uint32 at K = 65,536, or a type that no store has."""
    store = Path(shutil.copytree(lab.tokens, tmp_path / "store"))
    opened = TokenStore(store)
    write_sealed_json(store / "codebook.json", opened.codebook | {"k": k})
    stated = {} if dtype is None else {"dtype": dtype}
    write_sealed_json(store / "manifest.json", {**opened.manifest, "k": k, **stated})
    parts = ("dtype",) if dtype == "int8" else (f"tokens are {dtype or 'uint16'}", f"K = {k} are")
    mapet("tokenize", "inspect", store).refused(1, "manifest.json", *parts)


def test_a_manifest_of_the_largest_k(mapet, lab, tmp_path):
    """K = 2^31 in a manifest: counting and training are refused before tables of that size are made."""
    entry = next(iter(TokenStore(lab.tokens).entries))
    store = changed(lab.tokens, tmp_path / "store", lambda rows: rows.tokens)
    for path in (store / "shards").glob("*.json"):
        rows = read_shard(store, read_entry(store, path.stem))
        attributes = read_entry(store, path.stem)
        attributes = {field: attributes[field] for field in ("codebook_fingerprint", "view", "source", "skipped")}
        write_shard(store, path.stem, replace(rows, tokens=rows.tokens.astype(np.uint32)), attributes)
    described = TokenStore(lab.tokens).codebook | {"k": 2**31}
    write_sealed_json(store / "codebook.json", described)
    write_manifest(store, described, [read_entry(store, name) for name in TokenStore(lab.tokens).entries])
    assert TokenStore(store).read_rows(entry).tokens.dtype == np.uint32
    mapet("tokenize", "verify", store).ok()
    mapet("tokenize", "inspect", store).refused(1, "K = 2147483648", "more memory")
    words = ("--images", lab.images, "--tokens", store, "--out", tmp_path / "run")
    mapet("train", "pretrain", *words, *lab.settings).refused(1, "K = 2147483648", "more memory")
    write_sealed_json(store / "codebook.json", described | {"k": 2**31 + 1})
    mapet("tokenize", "inspect", store).refused(1, "codebook.json", "the field k is wrong")


def test_more_codes_than_there_may_be(mapet, lab, tmp_path):
    """K above 2^31, in --k and in a file of centroids."""
    words = ("--tower", lab.tower, "--k", 2**31 + 1, "--out", tmp_path / "book")
    mapet("tokenize", "build-codebook", lab.images, *words).refused(2, "--k 2147483649", "2147483648")
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 1), np.float16)) | {"shape": (2**31 + 1, 1)}
    with open(tmp_path / "centroids.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * (2**31 + 1))  # it is sparse
    words = ("--tower", lab.tower, "--centroids", tmp_path / "centroids.npy", "--out", tmp_path / "book")
    mapet("tokenize", "import", *words).refused(1, "2147483649 centroids", "2 to 2147483648")


def test_more_codes_than_patches(mapet, lab, tmp_path):
    """K = 65,537 of a sample of 3,000 patches."""
    words = ("--tower", lab.tower, "--k", 65_537, "--out", tmp_path / "book")
    mapet("tokenize", "build-codebook", lab.images, *words).refused(1, "--k 65537 is larger than the sample")


HIERARCHICAL = ("--k", 100, "--restarts", 2, "--iterations", 4, "--algorithm", "hierarchical", "--tower", "pixels:2")


def test_a_hierarchical_codebook_from_images_to_a_verified_store(mapet, lab, images, tmp_path):
    """build-codebook --algorithm hierarchical, again, with another algorithm; encoded, verified and inspected."""
    words = ("tokenize", "build-codebook", images, *HIERARCHICAL, "--image-size", 16, "--out", tmp_path / "book")
    assert "hierarchical (10 cells)" in mapet(*words).ok().text
    described = json.loads((tmp_path / "book/codebook.json").read_text())
    assert (described["algorithm"], described["cells"], described["best_restart"]) == ("hierarchical", 10, 0)
    assert [len(run) for run in described["objective"]] == [4]
    assert described["training"]["dead"] < 5
    assert described["training"]["mean_squared_distance"] > 0
    assert "nothing to do" in mapet(*words).ok().text
    mapet(*words, "--algorithm", "lloyd").refused(2, "other settings (algorithm)")
    mapet("tokenize", "encode-shards", images, "--codebook", tmp_path / "book", "--out", tmp_path / "tokens").ok()
    options = ("--codebook", tmp_path / "book", "--images", images, "--reencode", 3)
    assert "0 differ" in mapet("tokenize", "verify", tmp_path / "tokens", *options).ok().text
    mapet("tokenize", "inspect", tmp_path / "book", "--html", tmp_path / "page.html").ok()
    lloyd = json.loads((lab.codebook / "codebook.json").read_text())
    assert not {"algorithm", "cells"} & {*lloyd, *lloyd["request"]}


def test_an_algorithm_that_there_is_not(mapet, images, tmp_path):
    """--algorithm with a name that is not known."""
    words = ("--tower", "pixels:2", "--image-size", 16, "--algorithm", "fast", "--out", tmp_path / "book")
    mapet("tokenize", "build-codebook", images, *words).refused(
        2, "--algorithm fast is unknown", "lloyd", "hierarchical"
    )
    assert not (tmp_path / "book").exists()
