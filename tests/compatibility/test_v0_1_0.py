"""Artifacts of version 0.1.0 as it was before its modules moved into rooms: they open, and what was unfinished in them
is finished as that version finished it. `v0.1.0/README.md` says how they were made."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import mapet
import numpy as np
import pytest
import timm
import torch
import zarr
from mapet import Codebook, TokenStore
from mapet.shared.errors import UsageError
from mapet.shared.sources.sources import read_records
from mapet.shared.storage.files import read_sealed_json, write_sealed_json
from safetensors.numpy import load_file, save_file

OLD = Path(__file__).parent / "v0.1.0"
IMAGES = OLD / "images"
TOWER = f"local-dir:{Path(mapet.__file__).parent / 'quickstart' / 'tower'}"
STORES = ("tokens-zarr", "tokens-webdataset")
CODEBOOK_REQUEST = {"k": 16, "restarts": 2, "iterations": 4, "patches": 200}
CLOCKS = ("images_per_second", "data_wait", "memory_mb")


def _cpu() -> str:
    with open("/proc/cpuinfo") as lines:
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _made_here() -> bool:
    made_on = json.loads((OLD / "made_on.json").read_text())
    versions = {name: version(name) for name in made_on["versions"]}
    return os.path.exists("/proc/cpuinfo") and made_on["cpu"] == _cpu() and made_on["versions"] == versions


SAME_BITS = _made_here()
"""Whether this machine has the processor and the libraries that the artifacts were made with. Only then must results
be equal bit for bit; elsewhere kernels round differently."""


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("timings.json", ".lock"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_same_tensors(file: Path, old: Path) -> None:
    if SAME_BITS:
        assert file.read_bytes() == old.read_bytes(), file.name
    tensors, expected = load_file(file), load_file(old)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(tensors[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def assert_still_says(now: Any, before: Any, where: str = "") -> None:
    """`now` has everything that `before` has, with the same values; it may have more."""
    if isinstance(before, dict):
        assert before.keys() <= now.keys(), where
        for name, value in before.items():
            assert_still_says(now[name], value, f"{where}.{name}")
    elif isinstance(before, list):
        assert len(now) == len(before), where
        for place, value in enumerate(before):
            assert_still_says(now[place], value, f"{where}[{place}]")
    else:
        assert now == (pytest.approx(before, rel=1e-6) if isinstance(before, float) else before), where


def copied(name: str, to: Path) -> Path:
    return Path(shutil.copytree(OLD / name, to))


def without_pixels(images: Path, out: Path, tars: int = 2) -> Path:
    """A copy of the images whose first `tars` tars have the same names in them and pictures that cannot be decoded."""
    shutil.copytree(images, out)
    for path in sorted(out.glob("*.tar"))[:tars]:
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                data = b"not a picture" if member.name.endswith((".jpg", ".png")) else data
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return out


# The codebook, and what was left of unfinished ones.


def assert_same_codebook(folder: Path) -> None:
    book, old = Codebook.load(folder), Codebook.load(OLD / "codebook")
    # One patch in a few thousand lies so close between two centroids that another machine's rounding moves it.
    np.testing.assert_allclose(book.centroids, old.centroids, rtol=1e-3, atol=5e-4)
    if SAME_BITS:
        assert book.fingerprint == old.fingerprint
        assert (folder / "centroids.safetensors").read_bytes() == (OLD / "codebook/centroids.safetensors").read_bytes()


def test_the_codebook_has_its_fingerprint_and_figures():
    book = Codebook.load(OLD / "codebook")
    before = json.loads((OLD / "inspect" / "codebook.json").read_text())
    assert (book.fingerprint, book.k, book.grid) == (before["fingerprint"], 16, (8, 8))
    assert mapet.verify(OLD / "codebook") == 16
    del before["path"]
    assert_still_says(mapet.inspect(OLD / "codebook"), before)


def test_the_request_of_the_codebook_finds_it_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = copied("codebook", tmp_path / "codebook")
    before = contents(out)
    monkeypatch.chdir(tmp_path)  # there is no tower here that could build another one
    book = mapet.build_codebook(IMAGES, out, tower="local-dir:quickstart/tower", **CODEBOOK_REQUEST)
    assert book.fingerprint == Codebook.load(OLD / "codebook").fingerprint
    assert contents(out) == before


def test_the_features_cache_serves_without_looking_at_a_picture(tmp_path: Path):
    cache = copied("features-cache", tmp_path / "cache")
    blank = without_pixels(IMAGES, tmp_path / "images")
    out = tmp_path / "codebook"
    mapet.build_codebook(blank, out, tower=TOWER, features_cache=cache, **CODEBOOK_REQUEST)
    assert_same_codebook(out)
    mapet.build_codebook(blank, tmp_path / "smaller", tower=TOWER, features_cache=cache, k=8, patches=100)
    assert Codebook.load(tmp_path / "smaller").k == 8
    assert contents(cache) == contents(OLD / "features-cache")


def test_an_interrupted_extraction_goes_on_after_its_first_shard(tmp_path: Path):
    copied("extraction.work", tmp_path / ".codebook.work")
    first_is_blank = without_pixels(IMAGES, tmp_path / "images", tars=1)
    mapet.build_codebook(first_is_blank, tmp_path / "codebook", tower=TOWER, **CODEBOOK_REQUEST)
    assert_same_codebook(tmp_path / "codebook")
    assert not (tmp_path / ".codebook.work").exists()


def test_interrupted_k_means_goes_on_in_its_second_restart(tmp_path: Path):
    work = copied("kmeans.work", tmp_path / ".codebook.work")
    marked = 1.25
    _mark_first_iteration(work / "kmeans.safetensors", marked)
    blank = without_pixels(IMAGES, tmp_path / "images")
    book = mapet.build_codebook(blank, tmp_path / "codebook", tower=TOWER, **CODEBOOK_REQUEST)
    assert_same_codebook(tmp_path / "codebook")
    assert book.description["imbalance"][0][0] == marked  # it was not computed again
    assert not work.exists()


def _mark_first_iteration(state: Path, imbalance: float) -> None:
    from safetensors import safe_open

    with safe_open(state, "np") as file:
        run = json.loads(file.metadata()["run"])
    assert [len(iterations) for iterations in run["history"]] == [4, 1]
    run["history"][0][0]["imbalance"] = imbalance
    save_file(load_file(state), state, metadata={"run": json.dumps(run)})


# Token stores.


@pytest.mark.parametrize("name", STORES)
def test_a_store_is_sound_and_its_images_still_give_its_tokens(name: str):
    store = TokenStore(OLD / name)
    assert list(store) == [record.key for record in read_records(IMAGES)]
    assert store.fingerprint == Codebook.load(OLD / "codebook").fingerprint
    options = {"codebook": OLD / "codebook", "images": str(IMAGES), "tower": TOWER}
    assert mapet.verify(OLD / name, reencode=24, **options) == 24


def test_the_figures_of_a_store_are_what_they_were():
    before = json.loads((OLD / "inspect" / "tokens-zarr.json").read_text())
    del before["path"]
    key = "drawing-0011-000005"
    now = mapet.inspect(OLD / "tokens-zarr", key=key, against=OLD / "tokens-webdataset")
    assert_still_says(now, before)
    assert now["image"]["views"][0]["tokens"] == TokenStore(OLD / "tokens-zarr")[key].tokens[0].tolist()


def test_the_page_of_a_store_shows_it(tmp_path: Path):
    options = {"images": str(IMAGES), "codebook": OLD / "codebook", "tower": TOWER}
    mapet.inspect(OLD / "tokens-zarr", html=tmp_path / "page.html", **options)
    assert "drawing-0011-000000" in (tmp_path / "page.html").read_text()


def test_an_unfinished_store_is_finished_to_the_same_bytes(tmp_path: Path):
    out = copied("tokens-unfinished", tmp_path / "tokens")
    first = (out / "shards/drawings-000000.zarr.zip").stat().st_mtime_ns
    mapet.encode_shards(IMAGES, OLD / "codebook", out, tower=TOWER)
    assert (out / "shards/drawings-000000.zarr.zip").stat().st_mtime_ns == first
    if SAME_BITS:
        assert contents(out) == contents(OLD / "tokens-zarr")
    equal = TokenStore(out).to_numpy() == TokenStore(OLD / "tokens-zarr").to_numpy()
    assert equal.mean() > 0.999


def test_a_view_is_added_to_a_store_and_those_before_it_stay(tmp_path: Path):
    out = copied("tokens-webdataset", tmp_path / "tokens")
    views = {"crop": "random-resized", "views": 3, "format": "webdataset"}
    store = mapet.encode_shards(IMAGES, OLD / "codebook", out, tower=TOWER, **views)
    old = TokenStore(OLD / "tokens-webdataset")
    assert (old.views, store.views) == (2, 3)
    np.testing.assert_array_equal(store.to_numpy()[:, :2], old.to_numpy())
    assert mapet.verify(out, codebook=OLD / "codebook", images=str(IMAGES)) == 24


# Runs. The settings of the old one are those that its run.json says it was started with.


def overrides() -> list[str]:
    command = json.loads((OLD / "run" / "run.json").read_text())["starts"][0]["command"]
    return [value for option, value in pairwise(command) if option == "--set" and not value.startswith("probe.")]


PROBED = [f"probe.images={IMAGES}", f"probe.val={IMAGES}", "probe.every=8"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


LATER_METRICS: frozenset[str] = frozenset()
"""Metrics that v0.1.0 did not write: a line may have them beside its own, in any place."""


def without_clocks(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in CLOCKS}


def assert_same_lines(file: str, run: Path) -> None:
    now, before = lines(run / file), lines(OLD / "run" / file)
    now = [{name: value for name, value in line.items() if name not in LATER_METRICS} for line in now]
    assert [list(line) for line in now] == [list(line) for line in before]
    now, before = ([without_clocks(line) for line in part] for part in (now, before))
    if SAME_BITS:
        assert now == before
    for line, expected in zip(now, before, strict=True):
        assert_close(line, expected)


def assert_close(line: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses to 1e-5; of shares of right answers one answer in a band may differ."""
    for name, value in expected.items():
        tolerance = {"rel": 1e-5} if name in ("epoch", "loss", "lr") else {"rel": 1e-2, "abs": 0.05}
        numeric = isinstance(value, float) or name == "accuracy_by_rank"
        assert line[name] == (pytest.approx(value, **tolerance) if numeric else value), name


def assert_same_end(run: Path) -> None:
    newest = max((run / "checkpoints").iterdir())
    old = OLD / "run" / "checkpoints" / "step-0000018"
    assert newest.name == old.name
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        assert_same_tensors(newest / name, old / name)
    state, before = (
        read_sealed_json(path / "state.json", format="mapet-checkpoint", version=1) for path in (newest, old)
    )
    for part in (state, before):
        del part["files"], part["settings"]["probe"]
    assert_still_says(state, before)
    for file in ("metrics.jsonl", "keys/process-0.jsonl", "probe.jsonl"):
        assert_same_lines(file, run)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The old run as it was when it was stopped after its checkpoint at step 8."""
    run = copied("run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-0000018")
    return run


def test_a_stopped_run_goes_on_to_the_same_end(stopped: Path):
    last = mapet.pretrain(IMAGES, OLD / "tokens-zarr", stopped, overrides=[*overrides(), *PROBED], device="cpu")
    assert last == stopped / "checkpoints" / "step-0000018"
    assert_same_end(stopped)
    assert [start["step"] for start in json.loads((stopped / "run.json").read_text())["starts"]] == [0, 8]


def test_a_run_on_the_old_store_is_the_old_run(tmp_path: Path):
    out = tmp_path / "run"
    mapet.pretrain(IMAGES, OLD / "tokens-zarr", out, overrides=[*overrides(), *PROBED], device="cpu")
    assert lines(out / "keys" / "process-0.jsonl") == lines(OLD / "run" / "keys" / "process-0.jsonl")
    if SAME_BITS:  # other versions of torch draw other fresh weights from the same seed
        assert_same_end(out)


def test_a_finished_run_stays_as_it_is(tmp_path: Path):
    run = copied("run", tmp_path / "run")
    before = contents(run / "checkpoints")
    mapet.pretrain(IMAGES, OLD / "tokens-zarr", run, overrides=overrides(), device="cpu")
    assert contents(run / "checkpoints") == before
    assert_same_lines("metrics.jsonl", run)


def test_a_run_on_the_store_that_holds_the_images_starts_from_old_weights(tmp_path: Path):
    short = [*overrides(), "train.epochs=2", "train.ema=null"]
    run = mapet.pretrain(
        None, OLD / "tokens-webdataset", tmp_path / "run", overrides=short, init=OLD / "weights", device="cpu"
    )
    assert run.name == "step-0000012"


LATER_SETTINGS = [
    pytest.param(("train.spike", "train.on_bad_step", "execution.loss_chunk"), id="of how a step is computed"),
    pytest.param(
        ("objective.masking", "objective.permutation_block", "data.shuffle_shards", "data.color_jitter"),
        id="of what is computed",
    ),
]


def forget_settings(run: Path, names: tuple[str, ...]) -> None:
    """The checkpoint as a version that did not know these settings would have written it."""
    path = run / "checkpoints" / "step-0000008" / "state.json"
    state = read_sealed_json(path, format="mapet-checkpoint", version=1)
    for name in names:
        group, key = name.split(".")
        del state["settings"][group][key]
    write_sealed_json(path, state)


@pytest.mark.parametrize("names", LATER_SETTINGS)
def test_a_run_goes_on_that_was_begun_before_a_setting_was_added(names: tuple[str, ...], stopped: Path):
    forget_settings(stopped, names)
    mapet.pretrain(IMAGES, OLD / "tokens-zarr", stopped, overrides=[*overrides(), *PROBED], device="cpu")
    assert_same_end(stopped)


def test_a_later_setting_that_is_not_its_default_is_another_run(stopped: Path):
    forget_settings(stopped, ("objective.masking",))
    with pytest.raises(UsageError, match=r"objective\.masking"):
        mapet.pretrain(
            IMAGES, OLD / "tokens-zarr", stopped, overrides=[*overrides(), "objective.masking=uniform"], device="cpu"
        )


# Weights.

WEIGHTS = ("run", "run/checkpoints/step-0000018", "weights", "export")


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_every_kind_give_the_old_features(name: str, tmp_path: Path):
    out = mapet.features(IMAGES, OLD / name, tmp_path / "features.zarr", device="cpu")
    now, before = (zarr.open_group(path, mode="r") for path in (out, OLD / "features.zarr"))
    assert sorted(now.array_keys()) == sorted(before.array_keys()) == ["keys", "labels", "patches", "pooled"]
    for array in ("keys", "labels"):
        np.testing.assert_array_equal(now[array][:], before[array][:])
    for array in ("pooled", "patches"):
        np.testing.assert_allclose(now[array][:], before[array][:], rtol=1e-4, atol=1e-5)
    same = ("format", "version", "preprocess", "grid")
    assert {field: now.attrs[field] for field in same} == {field: before.attrs[field] for field in same}


def test_features_say_which_images_they_are_of():
    group = zarr.open_group(OLD / "features.zarr", mode="r")
    records = read_records(IMAGES)
    assert group["keys"][:].tolist() == [record.key for record in records]
    assert group["labels"][:].tolist() == [record.label for record in records]
    assert group["patches"].shape == (24, 8, 8, 16)
    assert dict(group.attrs)["weights"]["sha256"] == mapet.load_weights(OLD / "run").sha256()


@pytest.mark.parametrize(
    ("write", "name"), [(mapet.import_weights, "weights"), (mapet.export, "export")], ids=["import", "export"]
)
def test_a_run_gives_the_same_files_to_others(write: Callable[..., Path], name: str, tmp_path: Path):
    now, before = contents(write(OLD / "run", tmp_path / "out")), contents(OLD / name)
    if name == "export":  # it carries the digest of its tensors since then
        config = json.loads(now["config.json"])
        assert config.pop("model_sha256") == hashlib.sha256(now["model.safetensors"]).hexdigest()
        now["config.json"] = (json.dumps(config, indent=1) + "\n").encode()
    assert now == before


def test_the_import_is_read_as_the_run_that_it_is_of():
    run, imported = (mapet.load_weights(OLD / name) for name in ("run", "weights"))
    assert imported.shape == run.shape
    assert imported.tensors.keys() == run.tensors.keys()
    assert all(torch.equal(imported.tensors[name], run.tensors[name]) for name in run.tensors)


def test_timm_opens_the_export():
    model = timm.create_model(f"local-dir:{OLD / 'export'}", pretrained=True)
    encoder, old = model.state_dict(), mapet.load_weights(OLD / "run").tensors
    assert torch.equal(encoder["blocks.1.mlp.fc1.weight"], old["blocks.1.mlp.fc1.weight"])


def test_the_run_is_probed_and_reported(tmp_path: Path):
    (result,) = mapet.probe(OLD / "run", IMAGES, IMAGES, device="cpu")
    assert 0 <= result.knn <= 1
    options = {"tokens": OLD / "tokens-zarr", "images": IMAGES}
    page = mapet.report([OLD / "run"], html=tmp_path / "runs.html", device="cpu", **options)
    assert "probe/knn" in page.read_text() or "k-NN" in page.read_text()
