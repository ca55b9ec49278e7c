"""Images from a web server and stores behind URLs: the same bytes as local ones, and one sentence when it fails."""

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pytest
from mapet.shared.errors import DataError, UsageError
from mapet.shared.sources.sources import open_source
from mapet.shared.storage.files import read_sealed_json, write_sealed_json, written_whole
from mapet.shared.storage.remote import as_path
from mapet.shared.tokens.rows import COLUMNS
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.inspect import inspect
from mapet.tokenize_stage.verify import verify
from mapet.train_stage.pretrain import pretrain

TRAIN = ["model.name=null", "model.dim=32", "model.depth=1", "model.heads=2", "model.image_size=64"]
TRAIN += ["model.patch_size=8", "train.epochs=1", "train.batch_size=32", "optimizer.warmup_epochs=0"]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; `broken` names one that ends after half of what was promised, `forbidden` one for a 403."""

    broken = forbidden = None

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name == self.forbidden:
            return self.send_error(403)
        if name != self.broken:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
        return None


@contextmanager
def web_server(folder: Path, **settings: str) -> Iterator[str]:
    """Yields the URL of a server over `folder`."""
    handler = partial(type("Handler", (Handler,), settings), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def in_memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty folder of fsspec's file system in memory."""
    files = fsspec.filesystem("memory")
    yield f"memory://{request.node.name.partition('[')[0]}"
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def encode(chain) -> Callable[..., TokenStore]:
    def run(images, out, **options) -> TokenStore:
        return encode_shards(images, chain.codebook, out, batch_size=16, **options)

    return run


def files_of(store: Path) -> dict[str, bytes]:
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def remote_files_of(url: str) -> dict[str, bytes]:
    files, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}


def assert_same_rows(one: TokenStore, other: TokenStore) -> None:
    for (name, rows), (expected_name, expected) in zip(one.shards(), other.shards(), strict=True):
        assert name == expected_name
        for name in COLUMNS:
            assert np.array_equal(getattr(rows, name), getattr(expected, name)), name


# Images


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
def test_images_from_a_web_server_give_the_bytes_of_local_ones(chain, encode, tmp_path: Path, storage: str):
    encode(chain.images, tmp_path / "local", format=storage)
    numbered = chain.tars[0].name.replace("000000", "{000000..000002}")
    assert "{" in numbered
    with web_server(chain.images) as url:
        encode(f"{url}/{numbered}", tmp_path / "remote", format=storage)
        assert files_of(tmp_path / "remote") == files_of(tmp_path / "local")
        assert verify(tmp_path / "remote", images=f"{url}/{numbered}") == 96


def test_a_missing_and_a_forbidden_tar_are_errors_of_one_sentence(chain, encode, tmp_path: Path):
    with web_server(chain.images, forbidden=chain.tars[0].name) as url:
        with pytest.raises(DataError, match=rf"{url}/none\.tar does not exist\.$"):
            encode(f"{url}/none.tar", tmp_path / "out")
        with pytest.raises(DataError, match=rf"{chain.tars[0].name} cannot be read \(403.*check the address"):
            encode(f"{url}/{chain.tars[0].name}", tmp_path / "out")
    assert not list(tmp_path.rglob("*.zip"))


def test_a_server_that_goes_away_keeps_whole_shards_and_the_same_command_goes_on(
    chain, encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mapet.shared.storage.remote._PAUSES", (0.01, 0.02, 0.04, 0.08))
    names = [f"/{tar.name}" for tar in chain.tars]
    with web_server(chain.images, broken=chain.tars[1].name) as url:
        with pytest.raises(DataError, match=rf"{chain.tars[1].name} cannot be read"):
            encode([url + name for name in names], tmp_path / "out")
        assert [path.name for path in (tmp_path / "out/shards").glob("*.zip")] == [f"{chain.tars[0].stem}.zarr.zip"]
    with pytest.raises(DataError, match=rf"{url}/.* cannot be read"):
        encode([url + name for name in names], tmp_path / "out")
    with web_server(chain.images) as url:
        encode([url + name for name in names], tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(chain.tokens)


def test_a_tar_that_is_cut_on_the_server_is_named_by_its_url(chain, encode, source: Path, tmp_path: Path):
    victim = source / chain.tars[0].name
    victim.write_bytes(victim.read_bytes()[:20_000])
    with web_server(source) as url, pytest.raises(DataError, match=rf"{url}/{victim.name} is truncated inside"):
        encode(f"{url}/{victim.name}", tmp_path / "out")


def test_file_urls_are_local_paths(chain, encode, tmp_path: Path):
    assert [shard.root for shard in open_source(f"file://{chain.tars[0]}")] == [chain.tars[0]]
    encode(f"file://{chain.images}", f"file://{tmp_path}/out")
    assert files_of(tmp_path / "out") == files_of(chain.tokens)


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_protocol_whose_library_is_missing_names_the_package(
    chain, encode, tmp_path: Path, protocol: str, package: str
):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    for images in (f"{protocol}://bucket/x.tar", f"{protocol}://bucket"):
        with pytest.raises(UsageError, match=rf"{images} needs a library .*: pip install {package}\.$"):
            encode(images, tmp_path / "out")
    with pytest.raises(UsageError, match=rf"pip install {package}\.$"):
        encode(chain.images, f"{protocol}://bucket")


def test_an_unknown_protocol_is_a_usage_error(chain, encode):
    with pytest.raises(UsageError, match="nonsense://, which fsspec does not know"):
        encode(chain.images, "nonsense://bucket")


# Stores


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
def test_a_store_behind_a_url_has_the_bytes_of_a_local_one_and_is_read_alike(
    chain, encode, in_memory: str, tmp_path: Path, storage: str
):
    url, options = f"{in_memory}/deep/store", {"crop": "random-resized", "views": 2, "format": storage}
    local = encode(chain.images, tmp_path / "local", **options)
    encode(chain.tars[:2], url, **options | {"views": 1})
    remote = encode(chain.images, url, **options)
    assert remote_files_of(url) == files_of(tmp_path / "local")
    assert_same_rows(TokenStore(url), local)
    assert str(remote.path) == url
    key = str(local.read_rows(chain.tars[1].stem).keys[3])
    assert {**inspect(url, key=key), "path": ""} == {**inspect(local.path, key=key), "path": ""}
    assert verify(url, codebook=chain.codebook, images=str(chain.images)) == 96


def test_a_remote_store_is_gone_on_with_and_refuses_what_a_local_one_refuses(chain, encode, in_memory: str):
    encode(chain.tars[0], in_memory)
    files = fsspec.filesystem("memory")
    before = {path: files.modified(path) for path in files.find(in_memory)}
    encode(chain.tars[0], in_memory)
    assert {path: files.modified(path) for path in files.find(in_memory)} == before
    with pytest.raises(UsageError, match="begun with --format zarr"):
        encode(chain.tars[0], in_memory, format="webdataset")
    files.rm(f"{in_memory}/manifest.json")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        TokenStore(in_memory)
    encode(chain.images, in_memory)
    assert remote_files_of(in_memory) == files_of(chain.tokens)
    files.pipe_file(f"{in_memory}/other/notes.txt", b"mine")
    with pytest.raises(UsageError, match="is not empty and not a token store"):
        encode(chain.images, f"{in_memory}/other")


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
def test_damage_in_a_remote_store_is_found(chain, encode, in_memory: str, storage: str):
    encode(chain.images, in_memory, format=storage)
    files, suffix = fsspec.filesystem("memory"), {"zarr": "zarr.zip", "webdataset": "tar"}[storage]
    path = f"{in_memory}/shards/{chain.tars[1].stem}.{suffix}"
    whole = files.cat_file(path)
    for data, expected in ((whole[:-1], "bytes instead of"), (whole[:3000] + b"?" + whole[3001:], "was changed since")):
        files.pipe_file(path, data)
        with pytest.raises(DataError, match=rf"{path} .*{expected}"):
            list(TokenStore(in_memory).shards())
    files.rm(path)
    with pytest.raises(DataError, match=f"{path} is missing"):
        verify(in_memory)


def test_a_codebook_and_a_store_on_a_web_server_are_read(chain, encode, tmp_path: Path):
    shutil.copytree(chain.tokens, tmp_path / "web/tokens")
    shutil.copytree(chain.codebook, tmp_path / "web/codebook")
    with web_server(tmp_path / "web", forbidden="") as url:  # it does not list folders
        assert_same_rows(TokenStore(f"{url}/tokens"), TokenStore(chain.tokens))
        assert verify(f"{url}/tokens", codebook=f"{url}/codebook") == 96
        assert inspect(f"{url}/codebook")["fingerprint"] == TokenStore(chain.tokens).fingerprint
        encode_shards(chain.images, f"{url}/codebook", tmp_path / "out", batch_size=16)
        with pytest.raises(DataError, match="neither a codebook nor a token store"):
            inspect(f"{url}/nothing")
    assert files_of(tmp_path / "out") == files_of(chain.tokens)
    with pytest.raises(DataError, match=rf"{url}/tokens.* cannot be read .*check the address and the connection"):
        TokenStore(f"{url}/tokens")


def test_pretrain_reads_tokens_from_a_url_but_images_must_be_here(chain, encode, in_memory: str, tmp_path: Path):
    encode(chain.images, f"{in_memory}/zarr")
    encode(chain.images, f"{in_memory}/tars", format="webdataset")
    runs = {"local": chain.tokens, "zarr": f"{in_memory}/zarr", "tars": f"{in_memory}/tars"}
    for name, tokens in runs.items():
        pretrain(chain.images, tokens, tmp_path / name, overrides=TRAIN, device="cpu")
    losses = {
        tuple(json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        for name in runs
    }
    assert len(losses) == 1
    with pytest.raises(UsageError, match=r"is remote, and data\.shuffle=full reads images in any order"):
        pretrain(None, f"{in_memory}/tars", tmp_path / "no", overrides=TRAIN, device="cpu")


def test_a_remote_file_appears_whole_or_not_at_all(in_memory: str):
    path = as_path(f"{in_memory}/a/b.json")
    write_sealed_json(path, {"format": "f", "version": 1})
    with pytest.raises(ZeroDivisionError), written_whole(path) as partial:
        partial.write_text(str(1 / 0))
    assert read_sealed_json(path, format="f", version=1) == {"format": "f", "version": 1}
    assert list(remote_files_of(in_memory)) == ["a/b.json"]
