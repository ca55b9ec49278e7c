"""Pushing an export to the Hugging Face Hub, whose endpoint is a local server that speaks its protocol."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from mapet.shared.tokens.store import TokenStore

TOKEN = "hf_of_a_test"  # noqa: S105 (of nobody)


class Hub(ThreadingHTTPServer):
    """Repositories by name: whether they are private, and their files. `refusing` is a status for everything."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refusing: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        name = "/".join(self.path.partition("?")[0].split("/")[3:5])
        if name not in self.server.private:
            self.answer({"error": "Repository not found"}, 404)
        else:
            self.answer({"id": name, "private": self.server.private[name], "sha": "0" * 40, "tags": [], "siblings": []})

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.partition("?")[0].split("/")[1:]
        if hub.refusing or self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "You don't have the rights"}, hub.refusing or 401)
        elif parts[:3] == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[1] == "validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in
                     json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        else:
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])

    def _create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in self.server.private
        self.server.private.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
        self.answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if known else 200)

    def _commit(self, name: str, lines: list[dict]) -> None:
        added = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        self.server.files[name] = {path: base64.b64decode(content) for path, content in added.items()}
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(mapet, lab, hub: Hub, tmp_path: Path) -> Callable[..., object]:
    """push(*options, repo="me/vit", token=TOKEN, NAME="value of an environment variable")"""

    def call(*options: object, repo: str = "me/vit", token: str = TOKEN, weights: Path = lab.run, **environment: str):
        asked = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf")}
        words = ["train", "export", weights, "--out", tmp_path / "vit", "--push-to-hub", repo, *options]
        return mapet(*words, **{**asked, **environment})

    return call


def test_an_export_is_pushed(push, lab, hub: Hub, tmp_path: Path):
    """train export --push-to-hub uploads the folder and a model card with codebook, tower and metrics."""
    said = push("--private").ok().text
    assert f"Pushed to {hub.url}/me/vit/commit/1." in said
    assert hub.private == {"me/vit": True}
    uploaded = hub.files["me/vit"]
    assert set(uploaded) == {"model.safetensors", "config.json", "README.md"}
    assert all((tmp_path / "vit" / name).read_bytes() == content for name, content in uploaded.items())
    card = ModelCard(uploaded["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-feature-extraction")
    last = json.loads((lab.run / "metrics.jsonl").read_text().splitlines()[-1])
    store = TokenStore(lab.tokens)
    for part in (
        store.fingerprint,
        "tower local-dir:tower0",
        "K = 16",
        "pretraining on 48 images, 6 steps",
        f"training loss {last['loss']:.4f}, training accuracy {last['accuracy']:.2%}",
        'timm.create_model("hf-hub:me/vit", pretrained=True)',
    ):
        assert part in card.text
    assert str(lab.run.parent) not in card.content


def test_a_private_push_to_a_public_repository_is_refused(push, hub: Hub, tmp_path: Path):
    """--private uploads nothing to a repository that is public."""
    hub.private["me/vit"] = False
    push("--private").refused(2, "--private", "me/vit exists and is public, so nothing was uploaded", "hf upload")
    assert hub.files == {}
    assert (tmp_path / "vit" / "model.safetensors").exists()


def test_a_push_without_a_token_is_refused(push, tmp_path: Path):
    """Without a token, nothing is written."""
    push(token="").refused(2, "--push-to-hub me/vit", "needs a token", "HF_TOKEN", "hf auth login")
    assert not (tmp_path / "vit").exists()


def test_a_push_without_rights_is_one_sentence(push, hub: Hub, tmp_path: Path):
    """The hub refuses the token: the export stays, and the sentence says how to push it later."""
    hub.refusing = 403
    push().refused(1, "me/vit (403: You don't have the rights)", f"hf upload me/vit {tmp_path / 'vit'}")
    assert (tmp_path / "vit" / "config.json").exists()


def test_a_push_that_the_hub_fails_is_one_sentence(push, hub: Hub):
    """The hub answers with an error of its own."""
    hub.refusing = 400
    push().refused(1, "refused the upload to me/vit (400")


def test_a_push_without_a_network_is_one_sentence(push, tmp_path: Path):
    """Nobody answers at the hub's address."""
    push(HF_ENDPOINT="http://127.0.0.1:9").refused(1, "me/vit could not be pushed: the hub cannot be reached", "hf up")
    assert (tmp_path / "vit" / "config.json").exists()


def test_a_push_in_offline_mode_is_refused(push, tmp_path: Path):
    """HF_HUB_OFFLINE is set."""
    push(HF_HUB_OFFLINE="1").refused(2, "HF_HUB_OFFLINE is set; unset it")
    assert not (tmp_path / "vit").exists()


@pytest.mark.parametrize("repo", ["a/b/c", "-x", "a b"])
def test_a_push_to_no_name_is_refused(mapet, lab, tmp_path: Path, repo: str):
    """A name that no repository can have."""
    words = ["train", "export", lab.run, "--out", tmp_path / "vit", f"--push-to-hub={repo}"]
    mapet(*words).refused(2, f"--push-to-hub {repo}", "is no name of a repository")
    assert not (tmp_path / "vit").exists()


def test_private_without_a_push_is_refused(mapet, lab, tmp_path: Path):
    """--private says nothing without --push-to-hub."""
    mapet("train", "export", lab.run, "--out", tmp_path / "vit", "--private").refused(2, "--private", "--push-to-hub")
