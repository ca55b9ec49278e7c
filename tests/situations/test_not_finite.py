"""Features, centroids and tokens that are not numbers or out of range: refused at every door, naming the image."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.storage.files import sha256_file, write_sealed_json
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import ShardRows
from mapet.shared.tokens.shard_files import read_shard
from mapet.shared.tokens.store import TokenStore, read_entry, write_manifest, write_shard
from safetensors.numpy import load_file, save_file

FIRST_LAYER = "visual.transformer.resblocks.0.mlp.c_fc.bias"


@pytest.fixture
def broken(lab, tmp_path: Path) -> Callable[[float], str]:
    """broken(value): the name of a tower that gives NaN, and the folder of a codebook that names this tower."""

    def make(value: float) -> tuple[str, Path]:
        folder = Path(shutil.copytree(lab.tower.removeprefix("local-dir:"), tmp_path / "broken"))
        weights = folder / "open_clip_model.safetensors"
        tensors = {name: tensor.copy() for name, tensor in load_file(weights).items()}
        tensors[FIRST_LAYER][:] = value
        save_file(tensors, weights)
        from mapet.tokenize_stage.towers.opening import open_tower
        from mapet.tokenize_stage.towers.tower import TowerSettings

        tower = f"local-dir:{folder}"
        book = Codebook.load(lab.codebook)
        described = {**book.description, **open_tower(TowerSettings(tower), "cpu").description()}
        replace(book, description=described).save(tmp_path / "book")
        return tower, tmp_path / "book"

    return make


def first_key(images: Path) -> str:
    from mapet.shared.sources.sources import open_source

    return open_source(images)[0].index()[0].key


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_encode_with_a_tower_that_gives(mapet, lab, broken, tmp_path: Path, value: float):
    """encode-shards with a tower that gives NaN: refused with the image's key, no shard written"""
    _, book = broken(value)
    out = mapet("tokenize", "encode-shards", lab.images, "--codebook", book, "--out", tmp_path / "out")
    out.refused(1, repr(first_key(lab.images)), "NaN")
    assert not list(tmp_path.glob("out/shards/*"))


def test_skipping_does_not_skip_a_broken_tower(mapet, lab, broken, tmp_path: Path):
    """encode-shards --on-error skip with a tower that gives NaN: refused, not a store of nothing"""
    _, book = broken(np.nan)
    words = ["--codebook", book, "--out", tmp_path / "out", "--on-error", "skip"]
    mapet("tokenize", "encode-shards", lab.images, *words).refused(1, "NaN")


def test_codebook_of_a_tower_that_gives_nan(mapet, lab, broken, tmp_path: Path):
    """build-codebook with a tower that gives NaN: refused with the image's key"""
    tower, _ = broken(np.nan)
    words = ["--tower", tower, "--k", 4, "--restarts", 1, "--out", tmp_path / "new"]
    mapet("tokenize", "build-codebook", lab.images, *words).refused(1, "NaN", "--precision")
    assert not (tmp_path / "new").exists()


def nan_codebook(lab, folder: Path) -> Path:
    book = Codebook.load(lab.codebook)
    centroids = book.centroids.copy()
    centroids[3, 5] = np.nan
    folder.mkdir()
    save_file({"centroids": centroids, "counts": book.counts}, folder / "centroids.safetensors")
    described = replace(book, centroids=centroids).as_json(sha256_file(folder / "centroids.safetensors"))
    write_sealed_json(folder / "codebook.json", described)
    return folder


@pytest.mark.parametrize("command", ["encode", "inspect", "verify"])
def test_codebook_with_a_nan_centroid(mapet, lab, tmp_path: Path, command: str):
    """a sealed codebook with a NaN centroid: refused with its number"""
    book = nan_codebook(lab, tmp_path / "book")
    words = {
        "encode": ["encode-shards", lab.images, "--codebook", book, "--out", tmp_path / "out"],
        "inspect": ["inspect", book],
        "verify": ["verify", book],
    }
    mapet("tokenize", *words[command]).refused(1, "not finite", "the first is 3")


def with_tokens(tokens: Path, folder: Path, k: int | None, change: Callable[[ShardRows], np.ndarray]) -> Path:
    """A copy of a store whose first shard has the tokens that `change` returns, sealed again."""
    shutil.copytree(tokens, folder)
    store = TokenStore(folder)
    name = next(iter(store.entries))
    rows = read_shard(folder, store.entries[name])
    attributes = {field: store.entries[name][field] for field in ("codebook_fingerprint", "view", "source", "skipped")}
    write_shard(folder, name, replace(rows, tokens=change(rows)), attributes)
    described = store.codebook | ({} if k is None else {"k": k})
    if k is not None:
        write_sealed_json(folder / "codebook.json", described)
    write_manifest(folder, described, [read_entry(folder, each) for each in store.entries])
    return folder


def one_bad_token(rows: ShardRows) -> np.ndarray:
    tokens = rows.tokens.copy()
    tokens[2, 0, 1, 1] = 65535
    return tokens


def one_bad_image(rows: ShardRows) -> np.ndarray:
    tokens = rows.tokens.copy()
    tokens[2] = 65535
    return tokens


@pytest.mark.parametrize("command", ["inspect", "verify", "pretrain"])
def test_token_that_is_not_below_k(mapet, lab, tmp_path: Path, command: str):
    """a store with a token that is not below K: refused with the image's key"""
    store = with_tokens(lab.tokens, tmp_path / "store", None, one_bad_token)
    key = TokenStore(lab.tokens).read_rows(next(iter(TokenStore(lab.tokens).entries))).keys[2]
    words = {
        "inspect": ["tokenize", "inspect", store],
        "verify": ["tokenize", "verify", store],
        "pretrain": ["train", "pretrain", "--images", lab.images, "--tokens", store, "--out", tmp_path / "run"],
    }
    settings = lab.settings if command == "pretrain" else []
    mapet(*words[command], *settings).refused(1, repr(key), "65535", "K is 16")


def test_image_of_fill_tokens_at_the_largest_k(mapet, lab, tmp_path: Path):
    """K = 65,536 and an image whose tokens are all 65535, as NaN once gave: verify names it"""
    store = with_tokens(lab.tokens, tmp_path / "store", 65536, one_bad_image)
    mapet("tokenize", "verify", store).refused(1, "65535", "NaN")


def test_used_last_token_at_the_largest_k(mapet, lab, tmp_path: Path):
    """K = 65,536 and token 65535 at some patches only: a token like any other"""
    mapet("tokenize", "verify", with_tokens(lab.tokens, tmp_path / "store", 65536, one_bad_token)).ok()


def broken_run(lab, folder: Path) -> Path:
    shutil.copytree(lab.run, folder)
    for weights in folder.rglob("model.safetensors"):
        tensors = {name: tensor.copy() for name, tensor in load_file(weights).items()}
        tensors["patch_embed.proj.bias"][:] = np.nan
        save_file(tensors, weights)
    return folder


@pytest.mark.parametrize("command", ["features", "probe"])
def test_weights_that_give_nan(mapet, lab, tmp_path: Path, command: str):
    """weights that give NaN: features and probe are refused with the image's key, nothing is written"""
    run = broken_run(lab, tmp_path / "run")
    words = {
        "features": ["features", lab.images, "--weights", run, "--out", tmp_path / "f.zarr"],
        "probe": ["probe", run, "--images", lab.images, "--val", lab.images],
    }
    mapet("train", *words[command]).refused(1)
    assert not (tmp_path / "f.zarr").exists()
