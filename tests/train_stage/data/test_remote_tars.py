"""Training from remote tars: the samples of a local run, tars that come and go, one sentence when they do not come."""

import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from mapet.shared.errors import DataError, UsageError
from mapet.shared.runtime.loader import batches
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.train_stage.data import batch, remote_tars
from mapet.train_stage.data.batch import LoadBatch
from mapet.train_stage.data.batch_order import global_batches
from mapet.train_stage.data.dataset import TokenisedImages
from mapet.train_stage.data.join import join
from mapet.train_stage.data.remote_tars import fetched_tars
from mapet.train_stage.settings import Settings, resolve

IMAGES = 8


@pytest.fixture(scope="module")
def many(chain, tmp_path_factory: pytest.TempPathFactory, write_tar) -> Path:
    """The chain's 96 images in 12 tars, and their tokens in both formats."""
    from mapet.shared.sources.records import read_bytes
    from mapet.shared.sources.sources import read_records

    root, records = tmp_path_factory.mktemp("many"), read_records(chain.images)
    (root / "images").mkdir()
    for number in range(len(records) // IMAGES):
        some = records[number * IMAGES : (number + 1) * IMAGES]
        write_tar(root / f"images/{number:02}.tar", {f"{record.key}.jpg": read_bytes(record) for record in some})
    encode_shards(root / "images", chain.codebook, root / "tokens", batch_size=16)
    encode_shards(root / "images", chain.codebook, root / "whole", batch_size=16, format="webdataset")
    return root


@pytest.fixture
def remote(many: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a copy of all that in fsspec's file system in memory."""
    files = fsspec.filesystem("memory")
    url = f"memory://{request.node.name.partition('[')[0]}"
    for path in (path for path in many.rglob("*") if path.is_file()):
        files.pipe_file(f"{url}/{path.relative_to(many)}", path.read_bytes())
    yield url
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of this test alone; its name is short, as those of workers' sockets must be."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)


def settings_of(*overrides: str) -> Settings:
    small = ["model.image_size=64", "model.patch_size=8", "train.batch_size=10", "train.epochs=2"]
    return resolve("vit-tiny-16", [*small, "data.shuffle=shards", "data.shuffle_shards=3", *overrides])


def joined(images: str | Path | None, tokens: str | Path, settings: Settings) -> TokenisedImages:
    return join(images, TokenStore(tokens), shuffle=settings.data.shuffle, cache=settings.data.cache)


def samples(data: TokenisedImages, settings: Settings, start: int = 0, workers: int = 0) -> Iterator[dict]:
    """The batches of a run, as the trainer takes them."""
    places = ([(epoch, int(index)) for index in some] for epoch, some in global_batches(data, settings, start))
    with fetched_tars(data, settings, start) as passed:
        for step, batch in enumerate(batches(LoadBatch(data, settings), places, workers), start + 1):
            yield batch
            passed(step)


def assert_same(ours: Iterator[dict], theirs: Iterator[dict]) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("store", "workers"), [("tokens", 2), ("whole", 0)])
def test_remote_tars_give_the_samples_of_local_ones(many: Path, remote: str, temporary: Path, store: str, workers: int):
    settings = settings_of()
    urls = f"{remote}/images" if store == "tokens" else None
    data = joined(urls, f"{remote}/{store}", settings)
    here = joined(many / "images", many / "tokens", settings)
    assert data.keys_sha256 == here.keys_sha256
    assert_same(samples(data, settings, workers=workers), samples(here, settings))
    assert_same(samples(data, settings, 7, workers), samples(here, settings, 7))
    assert not list(temporary.glob("mapet-*"))


def test_a_tar_that_is_deleted_before_it_is_read_is_waited_for_again(
    many: Path, remote: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
):
    """A loader that is ahead finds the tar of an earlier group; it is deleted and comes again later."""
    settings = settings_of()
    data = joined(f"{remote}/images", f"{remote}/tokens", settings)
    aside, waited = temporary / "aside.tar", []

    def deleted_once_it_is_there(path: Path) -> None:
        remote_tars.wait_for(path)
        waited.append(path)
        if len(waited) == 1:
            path.rename(aside)
            threading.Timer(0.2, aside.rename, [path]).start()

    monkeypatch.setattr(batch, "wait_for", deleted_once_it_is_there)
    assert_same(samples(data, settings), samples(joined(many / "images", many / "tokens", settings), settings))
    assert waited[0] == waited[1]


def test_only_tars_of_the_present_and_next_groups_are_on_the_disk(remote: str, temporary: Path):
    settings = settings_of("data.shuffle_shards=2")
    data = joined(f"{remote}/images", f"{remote}/tokens", settings)
    seen, most = set(), 0
    for _ in samples(data, settings):
        tars = {path.name for path in temporary.rglob("[!.]*.tar")}
        most, seen = max(most, len(tars)), seen | tars
    assert len(seen) == 12
    # A batch of 10 may need the tars of two groups, and those of the next are on their way.
    assert most <= 6
    assert not list(temporary.glob("mapet-*"))


def test_a_cache_keeps_tars_for_the_next_run_up_to_its_limit(remote: str, many: Path, tmp_path: Path):
    settings = settings_of(f"data.cache={tmp_path / 'cache'}")
    data = joined(f"{remote}/images", f"{remote}/tokens", settings)
    first = list(samples(data, settings))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 12
    fsspec.filesystem("memory").rm(f"{remote}/images", recursive=True)
    assert_same(samples(data, settings), iter(first))
    sizes = [path.stat().st_size for path in (many / "images").glob("*.tar")]
    limited = settings_of(f"data.cache={tmp_path / 'small'}", f"data.cache_gb={9.5 * max(sizes) / 1e9}")
    for path in (many / "images").glob("*.tar"):
        fsspec.filesystem("memory").pipe_file(f"{remote}/images/{path.name}", path.read_bytes())
    again = joined(f"{remote}/images", f"{remote}/tokens", limited)
    most = 0
    for ours, theirs in zip(samples(again, limited), first, strict=True):
        assert torch.equal(ours["pixels"], theirs["pixels"])
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "small").glob("[!.]*.tar")))
    assert 6 * min(sizes) < most <= 9.5 * max(sizes)


def test_a_kept_tar_of_the_next_group_is_not_deleted_to_make_room_for_another(
    remote: str, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    put = queue.Queue.put

    def put_slowly(self, *arguments) -> None:
        """Threads begin with a group before all of its tars are queued."""
        put(self, *arguments)
        time.sleep(0.01)

    def arrives(path: Path) -> None:
        for _ in range(500):
            if path.exists():
                return
            time.sleep(0.01)
        pytest.fail(f"{path.name} never arrives")

    monkeypatch.setattr(queue.Queue, "put", put_slowly)
    monkeypatch.setattr(batch, "wait_for", arrives)
    largest = max(path.stat().st_size for path in (many / "images").glob("*.tar"))
    settings = settings_of(f"data.cache={tmp_path / 'cache'}", f"data.cache_gb={7.5 * largest / 1e9}", "train.epochs=6")
    here = joined(many / "images", many / "tokens", settings)
    assert_same(samples(joined(f"{remote}/images", f"{remote}/tokens", settings), settings), samples(here, settings))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_that_does_not_come_ends_the_run_with_one_sentence(remote: str, workers: int, temporary: Path):
    settings, files = settings_of(), fsspec.filesystem("memory")
    data = joined(f"{remote}/images", f"{remote}/tokens", settings)
    whole = files.cat_file(f"{remote}/images/05.tar")
    files.rm(f"{remote}/images/05.tar")
    with pytest.raises(DataError, match=r"^memory://.*/images/05\.tar does not exist\.$"):
        list(samples(data, settings, workers=workers))
    files.pipe_file(f"{remote}/images/05.tar", whole[:-512])
    with pytest.raises(DataError, match=rf"05\.tar has {len(whole) - 512} bytes and had {len(whole)} when it was enc"):
        list(samples(data, settings, workers=workers))
    damaged = bytearray(whole)
    damaged[1000:1100] = bytes(100)
    files.pipe_file(f"{remote}/images/05.tar", bytes(damaged))
    with pytest.raises(DataError, match=r"^memory://.*/images/05\.tar: image '.*' is not the one that was encoded"):
        list(samples(data, settings, workers=workers))
    assert not list(temporary.glob("mapet-*"))


def test_remote_images_need_an_order_by_shards_and_the_names_they_were_encoded_under(remote: str, many: Path):
    for images, tokens in ((f"{remote}/images", "tokens"), (None, "whole")):
        with pytest.raises(UsageError, match=r"is remote, and data\.shuffle=full reads .*data\.shuffle=shards"):
            join(images, TokenStore(f"{remote}/{tokens}"))
    files = fsspec.filesystem("memory")
    files.mv(f"{remote}/images/05.tar", f"{remote}/images/other.tar")
    with pytest.raises(DataError, match=r"/images/other\.tar has no tokens under its name in .*/tokens"):
        joined(f"{remote}/images", many / "tokens", settings_of())


def test_local_images_need_nothing(many: Path, temporary: Path):
    settings = settings_of()
    data = joined(many / "images", many / "tokens", settings)
    with fetched_tars(data, settings, 0) as passed:
        passed(1)
        assert not list(temporary.glob("mapet-*"))


KILLED = """
import sys
from mapet.shared.runtime.loader import batches
from mapet.shared.tokens.store import TokenStore
from mapet.train_stage.data.batch import LoadBatch
from mapet.train_stage.data.join import join
from mapet.train_stage.settings import resolve
from mapet.train_stage.data.remote_tars import fetched_tars
import fsspec
from pathlib import Path
root, settings = Path(sys.argv[1]), resolve(None, ["train.batch_size=10", "data.shuffle=shards"])
for path in (root / "images").glob("*.tar"):
    fsspec.filesystem("memory").pipe_file(f"memory://here/{path.name}", path.read_bytes())
data = join("memory://here", TokenStore(root / "tokens"), shuffle="shards")
with fetched_tars(data, settings, 0):
    print("ready", flush=True)
    object.__setattr__(data, "folder", data.folder / "never")
    next(batches(LoadBatch(data, settings), [[(0, 0)]], 1))
"""


def is_alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_runs_workers_end_and_the_next_run_deletes_its_tars(many: Path, remote: str, temporary: Path):
    """Its worker waits for a tar that never comes."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", KILLED, str(many)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    children, deadline = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
    while not children.read_text().split() and time.monotonic() < deadline:
        time.sleep(0.05)
    settings = settings_of()
    data = joined(f"{remote}/images", f"{remote}/tokens", settings)
    with fetched_tars(data, settings, 0):
        assert len(list(temporary.glob("mapet-tars-*"))) == 2  # a living one's is left alone
    workers = children.read_text().split()
    process.kill()
    process.wait()
    process.stdout.close()
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers
    assert not any(map(is_alive, workers))
    assert len(list(temporary.glob("mapet-tars-*"))) == 1
    left = []
    while left != [data.folder] and time.monotonic() < deadline:  # some kernels take a moment to release a lock
        with fetched_tars(data, settings, 0):
            left = list(temporary.glob("mapet-tars-*"))
    assert left == [data.folder]
    assert not list(temporary.glob("mapet-*"))
