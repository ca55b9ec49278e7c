"""Two writers on one output, processes that disagree, run logs, settings and signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.storage import lock
from mapet.shared.storage.files import read_sealed_json, write_sealed_json
from mapet.shared.storage.lock import sole_writer

from ..warm import COLD_COMMAND
from .conftest import _environment

FEW = "{images} --tower {tower} --k 16 --restarts 1 --iterations 2"
WRITERS = {
    "build-codebook": f"tokenize build-codebook {FEW} --out {{out}}",
    "features-cache": f"tokenize build-codebook {FEW} --out {{out}}-2 --features-cache {{out}}",
    "encode-shards": "tokenize encode-shards {images} --codebook {codebook} --out {out}",
    "import centroids": "tokenize import --centroids {array} --tower {tower} --out {out}",
    "inspect --html": "tokenize inspect {tokens} --html {out}",
    "pretrain": "train pretrain --images {images} --tokens {tokens} --out {out} {settings}",
    "features": "train features {images} --weights {run} --out {out}",
    "export": "train export {run} --out {out}",
    "import weights": "train import {run} --out {out}",
    "report": "train report {run} --html {out}",
}


@pytest.fixture
def words(lab, tmp_path: Path):
    def make(name: str, out: Path, **values: object) -> list[str]:
        if "{array}" in WRITERS[name]:
            np.save(tmp_path / "centroids.npy", np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32))
        places = {name: getattr(lab, name) for name in ("tower", "images", "codebook", "tokens", "run")}
        places |= {"out": out, "settings": " ".join(lab.settings), "array": tmp_path / "centroids.npy", **values}
        return WRITERS[name].format(**places).split()

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_output_in_use(mapet, words, tmp_path, monkeypatch, name):
    """Another process writes to the same output all the time."""
    monkeypatch.setattr(lock, "_LONGEST_WAIT", 0.1)
    with sole_writer(tmp_path / "out"):
        outcome = mapet(*words(name, tmp_path / "out"))
    outcome.refused(
        2, f"Another process is writing to {tmp_path / 'out'}", f"process {os.getpid()}", "since 20", "wait"
    )
    assert outcome.stderr.count("Waiting up to a minute") == 1
    assert not (tmp_path / "out").exists()


def finishing(out: Path, finished: Path) -> threading.Thread:
    """Holds the lock of `out` for a second; then `out` is a copy of `finished`."""
    held = threading.Event()

    def write() -> None:
        with sole_writer(out):
            held.set()
            time.sleep(1)
            shutil.copytree(finished, out)

    thread = threading.Thread(target=write)
    thread.start()
    held.wait()
    return thread


@pytest.mark.parametrize(
    ("name", "finished", "more", "sentence"),
    [
        ("pretrain", "run", ["--set", "train.seed=5"], "was begun with other settings (train.seed was 0 and is 5)"),
        ("encode-shards", "tokens", ["--crop", "random-resized"], "with other settings"),
        ("build-codebook", "codebook", ["--seed", "3"], "already holds a codebook made with other settings"),
        ("export", "run", [], "already exists"),
        ("features", "run", [], "already exists"),
    ],
)
def test_second_with_other_arguments(mapet, words, lab, tmp_path, name, finished, more, sentence):
    """The other process finishes while this one waits, with other arguments."""
    out, before = tmp_path / "out", getattr(lab, finished)
    other = finishing(out, before)
    outcome = mapet(*words(name, out), *more)
    other.join()
    outcome.refused(1 if name == "encode-shards" else 2, str(out), sentence)
    assert files(out) == files(before)


def test_second_with_the_same_arguments(mapet, words, lab, tmp_path):
    """The other process finishes the same run while this one waits."""
    other = finishing(tmp_path / "out", lab.run)
    outcome = mapet(*words("pretrain", tmp_path / "out")).ok()
    other.join()
    assert "Waiting up to a minute" in outcome.stderr
    checkpoints = files(lab.run / "checkpoints")
    assert files(tmp_path / "out" / "checkpoints") == checkpoints


def mixed(store: Path, tokens: Path, **changed: object) -> Path:
    """A copy of a store in whose second shard some fields of the entry are others, sealed as if written so."""
    shutil.copytree(tokens, store)
    manifest = read_sealed_json(store / "manifest.json", format="mapet-token-store", version=2)
    entry = manifest["shards"][1]
    if "storage" in changed:
        file = entry["file"].replace(".zarr.zip", ".tar")
        (store / entry["file"]).rename(store / file)
        changed |= {"file": file, "rows_sha256": "0" * 64}
    entry |= changed
    write_sealed_json(store / "manifest.json", manifest)
    path = store / "shards" / f"{entry['name']}.json"
    write_sealed_json(path, read_sealed_json(path, format="mapet-token-shard", version=2) | changed)
    return store


CHANGED = {
    "codebook": {"codebook_fingerprint": "0" * 64},
    "views": {"view": {"crop": "random-resized", "views": 1}},
    "format": {"storage": "webdataset"},
}


@pytest.mark.parametrize("kind", CHANGED)
def test_mixed_store_is_inspected(mapet, lab, tmp_path, kind):
    """A shard of the store was written by another encoding."""
    store = mixed(tmp_path / "store", lab.tokens, **CHANGED[kind])
    outcome = mapet("tokenize", "inspect", store)
    outcome.refused(1, f"{store} is mixed: shard ", "encode-shards")


@pytest.mark.parametrize("command", ["verify", "pretrain", "finish"])
def test_mixed_store_is_used(mapet, words, lab, tmp_path, command):
    """A shard of the store was made with another codebook."""
    store = mixed(tmp_path / "store", lab.tokens, **CHANGED["codebook"])
    if command == "finish":
        (store / "manifest.json").unlink()
        first = sorted(lab.images.glob("*.tar"))[0]
        outcome = mapet("tokenize", "encode-shards", first, "--codebook", lab.codebook, "--out", store)
    elif command == "verify":
        outcome = mapet("tokenize", "verify", store)
    else:
        outcome = mapet(*words("pretrain", tmp_path / "out", tokens=store))
    outcome.refused(1, str(store), "shard ", "codebook 000000000000")
    assert not (tmp_path / "out").exists()


DAMAGES = {
    "a flipped byte": lambda lines: [lines[0], lines[1].replace(b"{", b"\x00", 1), *lines[2:]],
    "a byte that is no UTF-8": lambda lines: [lines[0], b"\xff" + lines[1], *lines[2:]],
    "another program's line": lambda lines: [lines[0], b"[1, 2]", b"Killed", *lines[1:]],
    "a JSON object without a step": lambda lines: [lines[0], b'{"note": "mine"}', *lines[1:]],
    "an unfinished last line": lambda lines: [*lines[:-1], lines[-1][:20]],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics(mapet, words, lab, tmp_path, damage):
    """metrics.jsonl was damaged, and the run is resumed."""
    out = tmp_path / "run"
    shutil.copytree(lab.run, out)
    whole = (out / "metrics.jsonl").read_bytes().splitlines()
    damaged = DAMAGES[damage](whole)
    unfinished = damage == "an unfinished last line"
    (out / "metrics.jsonl").write_bytes(b"\n".join(damaged) + (b"" if unfinished else b"\n"))
    outcome = mapet(*words("pretrain", out)).ok()
    kept = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line)["step"] for line in damaged if line in whole]
    assert kept == expected
    aside = out / "metrics.damaged.jsonl"
    assert (aside.read_bytes().splitlines() if aside.exists() else []) == (
        [] if unfinished else [line for line in damaged if line not in whole]
    )
    assert (str(aside) in outcome.stderr.replace("\n", "")) is not unfinished


@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.clip_grad=inf",
        "optimizer.warmup_lr=nan",
        "optimizer.lr=inf",
        "optimizer.min_lr=-1e-5",
        "optimizer.eps=-1e-8",
        "optimizer.weight_decay=-0.1",
        "train.spike=inf",
        "train.seed=99999999999999999999",
        "data.workers=-1",
        "data.cache_gb=inf",
        "data.std=[0.2,0,0.2]",
        "data.mean=[0.2,nan,0.2]",
        "model.dim=-32",
        "model.drop_path=nan",
    ],
)
def test_impossible_setting(mapet, words, tmp_path, setting):
    """A setting that no run can be trained with."""
    outcome = mapet(*words("pretrain", tmp_path / "out"), "--set", setting)
    outcome.refused(2, setting.partition("=")[0])
    assert not (tmp_path / "out").exists()


def test_negative_workers(mapet, words, tmp_path):
    """encode-shards --workers -1"""
    outcome = mapet(*words("encode-shards", tmp_path / "out"), "--workers", "-1")
    assert outcome.exit_code == 2
    assert "--workers" in outcome.stderr
    assert not (tmp_path / "out").exists()


def training(start, words, out: Path) -> subprocess.Popen:
    """A run that would take hours, at its first steps."""
    process = start(*words("pretrain", out), "--set", "train.epochs=100000", "--device", "cpu")
    log = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_scheduler_signals(start, finish, words, tmp_path, name):
    """A scheduler or a closing terminal signals a run."""
    process = training(start, words, tmp_path / "out")
    process.send_signal(getattr(signal, name))
    outcome = finish(process)
    outcome.refused(130, "Stopped after step", "is written. Give the same command to resume.")
    assert list((tmp_path / "out" / "checkpoints").glob("step-*"))


def test_nohup(start, finish, words, tmp_path):
    """The terminal of a run under nohup closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = training(start, words, tmp_path / "out")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.terminate()
    finish(process).refused(130, "Stopped after step")


def test_interrupt_during_imports(tmp_path):
    """Ctrl-C while the command line is being imported."""
    code = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from mapet.cli import main
main()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert (ran.returncode, ran.stderr, ran.stdout) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    "name", ["build-codebook", "encode-shards", "pretrain", "export", "import weights", "features"]
)
def test_empty_out(mapet, words, tmp_path, name):
    """--out "$UNSET" """
    given = words(name, tmp_path / "out")
    given[given.index("--out") + 1] = ""
    mapet(*given, cwd=tmp_path).refused(2, "--out is empty")


def test_empty_folder_for_a_codebook(mapet, words, tmp_path):
    """The folder of --out was made beforehand."""
    (tmp_path / "out").mkdir()
    mapet(*words("build-codebook", tmp_path / "out")).ok()
    mapet("tokenize", "verify", tmp_path / "out").ok()


def test_full_folder_for_a_codebook(mapet, words, tmp_path):
    """--out of build-codebook is a folder with other files."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    mapet(*words("build-codebook", tmp_path / "out")).refused(2, str(tmp_path / "out"), "not a codebook")
    assert os.listdir(tmp_path / "out") == ["notes.txt"]


@pytest.mark.parametrize("name", ["pretrain", "export", "encode-shards"])
def test_out_below_a_file(mapet, words, tmp_path, name):
    """A part of --out's path is a file."""
    (tmp_path / "file").write_text("mine")
    outcome = mapet(*words(name, tmp_path / "file" / "out"))
    outcome.refused(1, "file/out could not be written", "choose another place")
    assert "make it writable" not in outcome.stderr


@pytest.mark.parametrize("command", ["verify", "inspect"])
@pytest.mark.parametrize("shards", [0, 1])
def test_unfinished_store(mapet, lab, tmp_path, command, shards):
    """The encoding of a store was interrupted."""
    store = tmp_path / "store"
    shutil.copytree(lab.tokens, store)
    (store / "manifest.json").unlink()
    if shards:
        sorted((store / "shards").glob("*.json"))[0].unlink()
    else:
        shutil.rmtree(store / "shards")
    outcome = mapet("tokenize", command, store)
    outcome.refused(1, f"{store} has no manifest.json (finished shards: {shards})", "did not finish; give the same")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


def under_torchrun(words: list[str], per_rank: str) -> tuple[int, str]:
    """Runs a command in two processes; `per_rank` is appended, in which the shell knows $RANK."""
    shell = f'exec "$@" {per_rank}'
    ran = subprocess.run(
        [*TORCHRUN, "bash", "-c", shell, "-", *COLD_COMMAND, *words],
        capture_output=True,
        text=True,
        timeout=100,
        env=_environment() | {"MAPET_TIMEOUT_MINUTES": "1"},
    )
    return ran.returncode, ran.stderr


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("name", "per_rank", "sentence"),
    [
        ("encode-shards", "--crop random-resized --seed $RANK", "--seed is 0 in process 0 and 1 in process 1"),
        ("pretrain", "--set train.seed=$RANK", "train.seed is 0 in process 0 and 1 in process 1"),
    ],
)
def test_ranks_with_different_arguments(words, tmp_path, name, per_rank, sentence):
    """The processes of one torchrun were given different arguments."""
    _, text = under_torchrun(words(name, tmp_path / "out"), per_rank)
    assert text.count(f"mapet: The processes of one torchrun must be started alike: {sentence}; give") == 1
    assert not (tmp_path / "out").exists()
