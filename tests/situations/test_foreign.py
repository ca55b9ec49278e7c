"""Situations of text, files and services that somebody else made: names, servers, limits of the machine."""

import argparse
import contextlib
import http.server
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest
import torch

from ..warm import COLD_COMMAND

HOSTILE_NAMES = {
    "markup": "[/x][red]",
    "escape": "\x1b[31m\x1b]0;title\x07",
    "newline": "a\nmapet: all is well",
    "bidi": "\u202egnp.\u2066",
    "emoji": ":cat: :warning:",
}


def safe(text: str) -> bool:
    """Whether nothing in the text could control a terminal or hide."""
    return not set("\x1b\x07\x9b\u202e\u2066\r") & set(text) and "\nmapet: all is well" not in text


@pytest.fixture(scope="module", params=HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def place(request, tmp_path_factory) -> Path:
    """A folder with a hostile name."""
    return tmp_path_factory.mktemp("foreign") / request.param


@pytest.fixture(scope="module")
def pictures(place, picture) -> Path:
    """Two class folders of 20 pictures whose names are as hostile as the folder's."""
    name = place.name
    for number in range(20):
        folder = place / "images" / f"{'ab'[number % 2]}{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}-{name.replace('.', '')}.jpg").write_bytes(picture(number))
    return place / "images"


def assert_safe(outcome):
    outcome.ok()
    assert safe(outcome.text), outcome.text
    return outcome


def test_hostile_names(mapet, lab, place, pictures):
    """Folders, files and classes whose names hold markup, escape sequences, line breaks, marks of direction."""
    options = ["--tower", lab.tower, "--k", 8, "--restarts", 1, "--iterations", 2]
    codebook, tokens, run = place / "codebook", place / "tokens", place / "run"
    assert_safe(mapet("tokenize", "build-codebook", pictures, *options, "--out", codebook))
    assert_safe(mapet("tokenize", "encode-shards", pictures, "--codebook", codebook, "--out", tokens))
    assert_safe(mapet("tokenize", "verify", tokens))
    page = ["--html", place / "page.html", "--images", pictures]
    shown = assert_safe(mapet("tokenize", "inspect", tokens, "--against", tokens, *page))
    if "cat" in place.name:
        assert ":cat:" in shown.stdout.replace("\n", "")
    assert safe((place / "page.html").read_text())
    settings = ["--images", pictures, "--tokens", tokens, "--out", run, *lab.settings]
    assert_safe(mapet("train", "pretrain", *settings))
    assert_safe(mapet("train", "report", run, "--images", pictures, "--tokens", tokens))
    assert safe((run / "report.html").read_text())
    assert_safe(mapet("train", "import", run, "--out", place / "weights"))
    assert_safe(mapet("train", "export", place / "weights", "--out", place / "export"))
    assert_safe(mapet("train", "features", pictures, "--weights", run, "--out", place / "features.zarr"))
    assert_safe(mapet("train", "probe", run, "--images", pictures, "--val", pictures))


UNDECODABLE = os.fsdecode(b"caf\xe9")


def test_undecodable_folder(mapet, lab, tmp_path):
    """A folder of images and one of tokens whose names are not UTF-8."""
    images, tokens = tmp_path / f"{UNDECODABLE}-images", tmp_path / f"{UNDECODABLE}-tokens"
    shutil.copytree(lab.images, images)
    mapet("tokenize", "encode-shards", images, "--codebook", lab.codebook, "--out", tokens).ok()
    shown = mapet("tokenize", "inspect", tokens, "--html", tmp_path / "page.html", "--images", images).ok()
    assert "caf\\udce9-tokens" in shown.stdout
    assert "caf\\udce9-tokens" in (tmp_path / "page.html").read_text(encoding="utf-8")
    printed = mapet("tokenize", "inspect", tokens, "--json").ok().stdout
    assert json.loads(printed)["path"] == str(tokens)
    mapet("train", "pretrain", "--images", images, "--tokens", tokens, "--out", tmp_path / "run", *lab.settings).ok()


def test_undecodable_run(mapet, lab, tmp_path):
    """A run's folder whose name is not UTF-8, which TensorBoard cannot write to."""
    places = ["--images", lab.images, "--tokens", lab.tokens, "--out", tmp_path / UNDECODABLE]
    mapet("train", "pretrain", *places, *lab.settings).refused(1, "caf\\udce9", "not a UTF-8 name")


@pytest.mark.parametrize("name", ["\x1b[2Jevil.jpg", "[/x].jpg", "a\nb.jpg", "\u202egnp.jpg"])
def test_member_that_is_no_image(mapet, lab, tmp_path, name):
    """A tar's member with a hostile name that is not an image."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 9
        tar.addfile(member, io.BytesIO(b"not a jpg"))
    out = tmp_path / "out"
    outcome = mapet("tokenize", "encode-shards", tmp_path / "a.tar", "--codebook", lab.codebook, "--out", out)
    assert outcome.exit_code == 1
    assert "Traceback" not in outcome.stderr
    assert not set("\x1b\u202e") & set(outcome.text)
    assert "\nb" not in outcome.text


def test_missing_hostile_path(mapet):
    """A path that does not exist and holds escape sequences."""
    mapet("tokenize", "inspect", "\x1b[31m[/x]\n").refused(1, "\\x1b[31m[/x]\\n")


def test_ascii_terminal(mapet, lab, tmp_path):
    """A terminal that can show ASCII only, and a path with an accent."""
    tokens = tmp_path / "café"
    shutil.copytree(lab.tokens, tokens)
    outcome = mapet("tokenize", "inspect", tokens, PYTHONIOENCODING="ascii").ok()
    assert "caf\\xe9" in outcome.stdout
    printed = mapet("tokenize", "inspect", tokens, "--json", PYTHONIOENCODING="ascii").ok()
    assert json.loads(printed.stdout)["path"] == str(tokens)


# --- limits of the machine


@pytest.mark.parametrize("files", [24, 32])
def test_few_descriptors(finish, lab, files):
    """A process that may open 24 or 32 files."""
    command = [*COLD_COMMAND, "tokenize", "verify", str(lab.tokens)]
    limited = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
    environment = dict(os.environ)
    if "MAPET_OF" in environment:
        environment["PYTHONPATH"] = environment["MAPET_OF"]
    process = subprocess.Popen(limited, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    finish(process).refused(2, f"may open {files} files", "ulimit -n")


def test_full_disk_of_tensorboard(mapet, lab, tmp_path, monkeypatch):
    """The disk is full when TensorBoard's events are written."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gfile.LocalFileSystem, "append", full)
    monkeypatch.setattr(gfile.LocalFileSystem, "write", full)
    run = tmp_path / "run"
    places = ["--images", lab.images, "--tokens", lab.tokens, "--out", run]
    mapet("train", "pretrain", *places, *lab.settings).refused(
        1, str(run / "tensorboard"), "No space left", "make room"
    )


def test_run_deleted_under_way(mapet, lab, tmp_path, monkeypatch):
    """Somebody deletes the run's folder while it trains."""
    from mapet.train_stage.runs.run import Run

    run, is_evaluated = tmp_path / "run", Run.is_evaluated

    def deletes(self: Run, step: int) -> bool:
        if step == 2:
            shutil.rmtree(run)
        return is_evaluated(self, step)

    monkeypatch.setattr(Run, "is_evaluated", deletes)
    places = ["--images", lab.images, "--tokens", lab.tokens, "--out", run]
    mapet("train", "pretrain", *places, *lab.settings).refused(1, str(run), "was deleted or moved")
    assert not run.exists()


def test_wandb_without_login(mapet, lab, tmp_path):
    """Weights & Biases is asked for, and nobody is logged in."""
    pytest.importorskip("wandb")
    places = ["--images", lab.images, "--tokens", lab.tokens, "--out", tmp_path / "run"]
    environment = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}
    mapet("train", "pretrain", *places, *lab.settings, "--set", "train.wandb=project", **environment).refused(
        2, "train.wandb=project", "wandb login"
    )


# --- published checkpoints of other sizes


@pytest.fixture
def published(lab, mapet, tmp_path) -> Path:
    """A checkpoint in the published format whose architecture is none of the published sizes."""
    from safetensors.torch import load_file

    mapet("train", "import", lab.run, "--out", tmp_path / "imported").ok()
    tensors = load_file(tmp_path / "imported" / "model.safetensors")
    path = tmp_path / "mine.pth.tar"
    torch.save({"state_dict": tensors, "arch": "mapet_mine", "args": argparse.Namespace()}, path)
    return path


def test_heads(mapet, published, tmp_path):
    """A published-format checkpoint of an unpublished size, with --heads."""
    mapet("train", "import", published, "--heads", 2, "--out", tmp_path / "out").ok()
    assert json.loads((tmp_path / "out" / "weights.json").read_text())["shape"]["heads"] == 2


def test_heads_missing(mapet, published, tmp_path):
    """A published-format checkpoint of an unpublished size, without --heads."""
    mapet("train", "import", published, "--out", tmp_path / "out").refused(1, str(published), "--heads")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("heads", "part"), [(3, "does not divide"), (0, "")])
def test_heads_that_do_not_fit(mapet, published, tmp_path, heads, part):
    """A number of heads that the width is not a multiple of, and none."""
    outcome = mapet("train", "import", published, "--heads", heads, "--out", tmp_path / "out")
    assert outcome.exit_code == 2
    assert "Traceback" not in outcome.stderr
    assert part in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_heads_of_a_run(mapet, lab, tmp_path):
    """--heads for a run, which states its heads itself."""
    mapet("train", "import", lab.run, "--heads", 2, "--out", tmp_path / "out").refused(2, "--heads", str(lab.run))


# --- servers


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves one file; the first two requests for it get at most `most` bytes before the connection breaks off."""

    content = b""
    most = 0
    ranges = True
    requests: list[str | None]

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        asked = self.headers.get("Range") if self.ranges else None
        begin = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if body:
            self.requests.append(asked)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("Content-Length", str(len(self.content) - begin))
        self.send_header("ETag", '"version"')
        self.end_headers()
        if body:
            end = begin + self.most if len(self.requests) < 3 else len(self.content)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(self.content[begin:end])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["ranges", "no-ranges"])
def breaking_server(request, lab):
    content = sorted(lab.images.glob("*.tar"))[0].read_bytes()
    attributes = {"content": content, "most": len(content) // 3, "ranges": request.param, "requests": []}
    handler = type("Server", (_Server,), attributes)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.tar", handler
    server.shutdown()
    server.server_close()


def test_connection_that_breaks_off(mapet, lab, tmp_path, breaking_server, monkeypatch):
    """A server that breaks off twice in the middle of a tar."""
    monkeypatch.setattr("mapet.shared.storage.remote._PAUSES", (0.0,) * 4, raising=False)
    url, handler = breaking_server
    mapet("tokenize", "encode-shards", url, "--codebook", lab.codebook, "--out", tmp_path / "out").ok()
    mapet("tokenize", "verify", tmp_path / "out").ok()
    if handler.ranges:
        third = handler.most
        assert [request for request in handler.requests if request] == [f"bytes={third}-", f"bytes={2 * third}-"]
