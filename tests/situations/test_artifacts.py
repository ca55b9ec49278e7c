"""Artifacts of strangers and old exports, as the command line meets them: codebooks, stores, runs, exports, recipes."""

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mapet.shared.storage.files import SEAL, sha256_file, write_sealed_json


def load(path: Path) -> dict:
    content = json.loads(path.read_text())
    content.pop(SEAL, None)
    return content


def reseal(path: Path, **changes: Any) -> None:
    write_sealed_json(path, {**load(path), **changes})


@pytest.fixture
def store(lab, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lab.tokens, tmp_path / "tokens"))


@pytest.fixture
def book(lab, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lab.codebook, tmp_path / "codebook"))


@pytest.fixture
def run(lab, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lab.run, tmp_path / "run"))


def change_entry(store: Path, **changes: Any) -> None:
    """Changes the first entry and the manifest alike, as a hostile writer would."""
    manifest = load(store / "manifest.json")
    path = store / "shards" / f"{manifest['shards'][0]['name']}.json"
    manifest["shards"][0] |= changes
    reseal(path, **changes)
    manifest["images"] = sum(entry["images"] for entry in manifest["shards"])
    write_sealed_json(store / "manifest.json", manifest)


def shard_of(store: Path) -> Path:
    return sorted(store.glob("shards/*.zip"))[0]


def rewrite_shard(store: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    path = shard_of(store)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    change_entry(store, bytes=path.stat().st_size, sha256=sha256_file(path))


BOOK_FIELDS = {
    "k is a text": ({"k": "16"}, "k"),
    "grid is negative": ({"grid": [-8, 8]}, "grid"),
    "grid of a trillion": ({"grid": [10**12, 8]}, "grid"),
    "preprocess is empty": ({"preprocess": {}}, "preprocess"),
    "metric is unknown": ({"metric": "../x"}, "metric"),
    "dim does not fit": ({"dim": 33}, "centroids.safetensors"),
    "sample is a number": ({"sample": 5}, "sample"),
}


@pytest.mark.parametrize(("changes", "named"), BOOK_FIELDS.values(), ids=BOOK_FIELDS)
def test_codebook_with_a_wrong_field(mapet, book, changes, named):
    """A sealed codebook.json in which one field is wrong."""
    reseal(book / "codebook.json", **changes)
    mapet("tokenize", "inspect", book).refused(1, named)


ENTRY_FIELDS = {
    "file above the store": {"file": "../outside.zarr.zip"},
    "absolute file": {"file": "/etc/passwd"},
    "device": {"file": "/dev/zero"},
    "a trillion images": {"images": 10**12},
    "images as text": {"images": "24"},
    "a million views": {"view": {"crop": "center", "views": 10**6}},
    "digest of another kind": {"sha256": 5},
    "no source": {"source": None},
}


@pytest.mark.parametrize("changes", ENTRY_FIELDS.values(), ids=ENTRY_FIELDS)
def test_store_with_a_wrong_entry(mapet, store, changes):
    """A sealed token store in whose entry one field is wrong, or names a file elsewhere."""
    manifest = load(store / "manifest.json")
    manifest["shards"][0] |= changes
    write_sealed_json(store / "manifest.json", manifest)
    mapet("tokenize", "inspect", store).refused(1, "manifest.json")


@pytest.mark.parametrize("field", ["codebook_fingerprint", "view", "grid", "storage"])
def test_mixed_store(mapet, store, field):
    """A store one of whose shards has another codebook, view policy, grid or format than the rest."""
    other = {
        "codebook_fingerprint": "0" * 64,
        "view": {"crop": "random-resized", "views": 1},
        "grid": [4, 4],
        "storage": "webdataset",
    }
    manifest = load(store / "manifest.json")
    manifest["shards"][1][field] = other[field]
    if field == "storage":
        name = manifest["shards"][1]["name"]
        manifest["shards"][1] |= {"file": f"shards/{name}.tar", "rows_sha256": "0" * 64}
    write_sealed_json(store / "manifest.json", manifest)
    mapet("tokenize", "inspect", store).refused(1, "manifest.json", field)


def test_shard_that_is_a_link_to_elsewhere(mapet, store, tmp_path):
    """A shard is a link to a file outside of the store."""
    path = shard_of(store)
    path.rename(tmp_path / "elsewhere.zip")
    path.symlink_to(tmp_path / "elsewhere.zip")
    mapet("tokenize", "inspect", store).refused(1, "is a link to", "elsewhere.zip")


def test_store_in_the_cache_of_hugging_face(mapet, store, tmp_path):
    """A store whose files are links into the blobs of the Hugging Face cache opens."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in store.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(store)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    mapet("tokenize", "inspect", snapshot).ok()


@pytest.mark.parametrize("name", ["manifest.json", "codebook.json"])
def test_manifest_that_is_a_pipe(mapet, store, name):
    """A JSON file of a store is a named pipe, which would be read for ever."""
    (store / name).unlink()
    os.mkfifo(store / name)
    mapet("tokenize", "inspect", store).refused(1, "is not a regular file")


def test_shard_of_zarr_2(mapet, store):
    """A shard that is a Zarr 2 group, whose filters could unpickle code."""

    def change(files: dict[str, bytes]) -> None:
        files.clear()
        files[".zgroup"] = b'{"zarr_format": 2}'

    rewrite_shard(store, change)
    mapet("tokenize", "inspect", store).refused(1, ".zarr.zip")


def test_shard_with_a_foreign_codec(mapet, store):
    """A shard whose chunks name a codec that mapet does not write."""

    def change(files: dict[str, bytes]) -> None:
        metadata = json.loads(files["labels/zarr.json"])
        metadata["codecs"][1] = {"name": "numcodecs.pickle", "configuration": {}}
        files["labels/zarr.json"] = json.dumps(metadata).encode()

    rewrite_shard(store, change)
    mapet("tokenize", "inspect", store).refused(1, "codecs", "numcodecs.pickle")


def test_shard_whose_metadata_claims_a_billion_rows(mapet, store):
    """An array of a shard states a billion rows."""

    def change(files: dict[str, bytes]) -> None:
        metadata = json.loads(files["tokens/zarr.json"])
        metadata["shape"][0] = 10**9
        files["tokens/zarr.json"] = json.dumps(metadata).encode()

    rewrite_shard(store, change)
    mapet("tokenize", "verify", store).refused(1, "tokens of uint16")


def test_tar_shard_with_a_negative_size(mapet, lab, tmp_path):
    """A tokenised tar whose member has a negative size, which tarfile follows backwards for ever."""
    out = tmp_path / "tars"
    words = ("--codebook", lab.codebook, "--out", out, "--format", "webdataset")
    mapet("tokenize", "encode-shards", lab.images, *words).ok()
    path = sorted(out.glob("shards/*.tar"))[0]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers = {"size": "-100000"}
        tar.addfile(member, io.BytesIO())
        tar.addfile(tarfile.TarInfo("b.jpg"), io.BytesIO())
    change_entry(out, bytes=path.stat().st_size, sha256=sha256_file(path))
    mapet("tokenize", "inspect", out, process=True).refused(1, path.name)


def test_export_with_a_flipped_byte(mapet, lab, tmp_path):
    """One byte of an export's weights has changed."""
    out = tmp_path / "export"
    mapet("train", "export", lab.run, "--out", out).ok()
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-7] ^= 1
    (out / "model.safetensors").write_bytes(data)
    mapet("train", "import", out, "--out", tmp_path / "weights").refused(
        1, "model.safetensors", "digest does not match"
    )
    assert not (tmp_path / "weights").exists()


def test_export_from_before_the_digest(mapet, lab, tmp_path):
    """An export without a digest in its config.json opens, with one line that says so."""
    out = tmp_path / "export"
    mapet("train", "export", lab.run, "--out", out).ok()
    config = json.loads((out / "config.json").read_text())
    del config["model_sha256"]
    (out / "config.json").write_text(json.dumps(config))
    outcome = mapet("train", "import", out, "--out", tmp_path / "weights").ok()
    assert "carries no digest" in outcome.stderr


@pytest.mark.parametrize("field", ["embed_dim", "depth", "num_heads", "img_size", "mlp_ratio"])
def test_export_of_an_impossible_shape(mapet, lab, tmp_path, field):
    """config.json of an export states a size of a billion, for which a model would be built."""
    out = tmp_path / "export"
    mapet("train", "export", lab.run, "--out", out).ok()
    config = json.loads((out / "config.json").read_text())
    config["model_args"][field] = 10**9
    (out / "config.json").write_text(json.dumps(config))
    mapet("train", "import", out, "--out", tmp_path / "weights").refused(1, str(out))


STATES = {
    "a name above the folder": {"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}},
    "no files": {"files": {}},
    "model of no depth": {"model": {"dim": 32, "depth": 0, "heads": 2, "patch_size": 8, "image_size": 64, "k": 16}},
    "settings are a list": {"settings": [1]},
    "step of another checkpoint": {"step": 1},
}


@pytest.mark.parametrize("changes", STATES.values(), ids=STATES)
def test_checkpoint_with_a_wrong_state(mapet, lab, run, changes):
    """The sealed state.json of the only checkpoint has a wrong field; the run is given again."""
    newest, *others = sorted(run.glob("checkpoints/*"), reverse=True)
    for path in others:
        shutil.rmtree(path)
    reseal(newest / "state.json", **changes)
    words = ("--images", lab.images, "--tokens", lab.tokens, "--out", run, *lab.settings)
    mapet("train", "pretrain", *words).refused(1, "checkpoints")


RECIPES = {
    "the environment": "data:\n  cache: ${oc.env:HOME}\n",
    "a resolver inside a reference": "data:\n  cache: ${${x}:HOME}\n",
    "code": "model: !!python/object/apply:os.system ['true']\n",
    "aliases that expand to a billion": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)),
    "an alias inside itself": "a: &a\n  b: *a\n",
    "a list": "- 1\n",
    "deep nesting": "[" * 5000,
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_recipe_of_a_stranger(mapet, lab, tmp_path, text):
    """A recipe reads the environment, makes objects, or expands without an end."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    words = ("--images", lab.images, "--tokens", lab.tokens, "--out", tmp_path / "run", "--recipe", recipe)
    mapet("train", "pretrain", *words, *lab.settings).refused(2, "recipe.yaml")
    assert not (tmp_path / "run").exists()


def test_recipe_that_refers_to_itself(mapet, lab, tmp_path):
    """A recipe refers to another of its settings, which stays allowed."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train:\n  checkpoint_every: ${train.log_every}\n")
    words = ("--images", lab.images, "--tokens", lab.tokens, "--recipe", recipe, "--out", tmp_path / "run")
    mapet("train", "pretrain", *words, *lab.settings).ok()


LINES = {
    "a text for a number": ("loss", "x"),
    "a list for a number": ("images_per_second", [1]),
    "a negative step": ("step", -1),
}


@pytest.mark.parametrize(("field", "value"), LINES.values(), ids=LINES)
def test_report_of_a_wrong_log(mapet, run, field, value):
    """A line of metrics.jsonl has a value of the wrong type."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0][field] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mapet("train", "report", run).refused(1, "metrics.jsonl", field)


def test_weights_that_are_not_finite(mapet, lab, tmp_path):
    """Sealed weights that hold NaN."""
    from safetensors.numpy import load_file, save_file

    out = tmp_path / "weights"
    mapet("train", "import", lab.run, "--out", out).ok()
    tensors = load_file(out / "model.safetensors")
    tensors["norm.weight"] = np.full_like(tensors["norm.weight"], np.nan)
    save_file(tensors, out / "model.safetensors")
    reseal(out / "weights.json", sha256=sha256_file(out / "model.safetensors"))
    mapet("train", "export", out, "--out", tmp_path / "export").refused(1, "not finite", "norm.weight")
