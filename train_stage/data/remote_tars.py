"""Remote tars on this disk: fetched shortly before their images are needed and deleted afterwards.

The first process of each node fetches in background threads; a loader waits until the tar of its image is complete.
"""

import fcntl
import os
import queue
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import get_worker_info

from ...shared.errors import DataError, MapetError
from ...shared.runtime.distributed import local_rank
from ...shared.storage.remote import download, without_query
from ..settings import RunSettings
from .batch_order import shard_groups
from .image_set import ImageSet, RemoteTar
from .join import TARS_PREFIX

_AT_ONCE = 4
_LOCK = ".lock"


def _failure_note(path: Path) -> Path:
    return path.with_name(f"{path.name}.failed")


def _write_failure_note(path: Path, message: str) -> None:
    """Writes the note under its name only when it is whole: loaders read it as soon as it exists."""
    note = _failure_note(path)
    partial = note.with_name(f".{note.name}.{os.getpid()}.{threading.get_ident()}.partial")
    partial.write_text(message, encoding="utf-8")
    os.replace(partial, note)


def wait_for(path: Path) -> None:
    """Returns once the tar at `path` exists. Raises DataError if it could not be fetched."""
    parent, pause = os.getppid(), 0.01
    while not path.exists():
        with suppress(FileNotFoundError):
            raise DataError(_failure_note(path).read_text(encoding="utf-8"))
        if get_worker_info() and os.getppid() != parent:
            raise DataError(f"{path} will not arrive: the process that fetches it has ended.")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


@dataclass(frozen=True)
class _Group:
    """Tars whose images are used between two steps, both counted from the beginning of the run."""

    first: int
    last: int
    tars: dict[Path, RemoteTar]


def _groups(images: ImageSet, settings: RunSettings, start: int, epochs: int | None) -> Iterator[_Group]:
    """The groups of an order by shards from step `start` on, in the order of `order.global_batches`."""
    size = settings.train.batch_size
    steps = len(images) // size
    begins = [0, *images.shard_ends[:-1].tolist()]
    for epoch in range(start // steps, epochs or settings.train.epochs):
        seen = 0
        for group in shard_groups(images, settings, epoch):
            count = sum(int(images.shard_ends[shard]) - begins[shard] for shard in group)
            first, last = epoch * steps + seen // size, epoch * steps + min((seen + count - 1) // size, steps - 1)
            seen += count
            if max(first, start) <= last:
                tars = (images.remote_tar(begins[shard]) for shard in group)
                yield _Group(first, last, {tar.path: tar for tar in tars if tar})


@contextmanager
def fetched_tars(
    images: ImageSet, settings: RunSettings, start: int, epochs: int | None = None
) -> Iterator[Callable[[int], None]]:
    """Fetches the tars of remote images while the block runs, from step `start` on; local images need nothing.

    `epochs` is that of `batch_order.global_batches`.

    Yields `passed(steps)`, to be called with the number of steps that all processes have done; it raises DataError if
    a tar could not be fetched. Tars behind the current position are deleted, or kept in `data.cache` as long as
    `data.cache_gb` allows.
    """
    if images.folder is None or local_rank() != 0:
        yield lambda steps: None
        return
    with _claimed(images.folder, settings.data.cache is not None):
        limit = settings.data.cache_gb
        keep = 0 if settings.data.cache is None else float("inf") if limit is None else limit * 1e9
        fetcher = _Fetcher(_groups(images, settings, start, epochs), keep)
        fetcher.passed(start)
        try:
            yield fetcher.passed
        finally:
            fetcher.stop()


@contextmanager
def _claimed(folder: Path, keeps: bool) -> Iterator[None]:
    """Makes the folder of tars. A temporary one is deleted afterwards, as are those that killed processes left."""
    if keeps:
        folder.mkdir(parents=True, exist_ok=True)
        for note in folder.glob("*.failed"):
            note.unlink(missing_ok=True)
        yield
        return
    for abandoned in Path(tempfile.gettempdir()).glob(f"{TARS_PREFIX}*"):
        _delete_unless_used(abandoned)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Renamed first: a tar that is still being fetched must not appear in a folder that is being deleted.
            deleted = folder.with_name(f"{folder.name}-gone")
            os.replace(folder, deleted)
            shutil.rmtree(deleted, ignore_errors=True)


def _delete_unless_used(folder: Path) -> None:
    with suppress(OSError), open(folder / _LOCK, "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by its process as long as that lives
        shutil.rmtree(folder, ignore_errors=True)


class _Fetcher:
    """Threads that fetch the tars of the current groups and of the next one."""

    def __init__(self, groups: Iterator[_Group], keep: float) -> None:
        self.groups, self.keep = groups, keep
        self.window: deque[_Group] = deque()
        self.wanted: queue.Queue[RemoteTar | None] = queue.Queue()
        self.failure: MapetError | None = None
        self.making_room = threading.Lock()
        self.under_way = 0
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_AT_ONCE)]
        for thread in self.threads:
            thread.start()

    def passed(self, steps: int) -> None:
        """Drops the groups that end before step `steps`, and queues the ones that follow."""
        if self.failure:
            raise self.failure
        over = []
        with self.making_room:
            while self.window and self.window[0].last < steps:
                over.append(self.window.popleft())
        while not self.window or self.window[-1].first <= steps:
            group = next(self.groups, None)
            if group is None:
                break
            absent = [tar for path, tar in group.tars.items() if not any(path in one.tars for one in self.window)]
            # Before they are queued: a tar that a thread finds in the cache must not be deleted to make room any more.
            with self.making_room:
                self.window.append(group)
            for tar in absent:
                self.wanted.put(tar)
        for path in {path for group in over for path in group.tars}:
            if self.keep == 0 and not any(path in group.tars for group in self.window):
                path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Starts no further downloads; a download that takes longer than a second ends with the process."""
        with suppress(queue.Empty):
            while True:
                self.wanted.get_nowait()
        for _ in self.threads:
            self.wanted.put(None)
        for thread in self.threads:  # a thread that has just begun would make the folder again
            thread.join(timeout=1)

    def _work(self) -> None:
        while tar := self.wanted.get():
            try:
                self._fetch(tar)
            except Exception as error:
                self.failure = error if isinstance(error, MapetError) else _not_stored(tar, error)
                with suppress(OSError):
                    _write_failure_note(tar.path, str(self.failure))

    def _fetch(self, tar: RemoteTar) -> None:
        if tar.path.exists() and tar.path.stat().st_size == tar.size:
            tar.path.touch()
            return
        self._make_room(tar)
        partial = tar.path.with_name(f".{tar.path.name}.{os.getpid()}.partial")
        try:
            download(tar.url, partial)
            size = partial.stat().st_size
            if size != tar.size:
                raise DataError(
                    f"{without_query(tar.url)} has {size} bytes and had {tar.size} when it was encoded; restore it or "
                    "encode it again."
                )
            os.replace(partial, tar.path)
        finally:
            partial.unlink(missing_ok=True)
            with self.making_room:
                self.under_way -= tar.size

    def _make_room(self, tar: RemoteTar) -> None:
        """Deletes tars outside the window, the least recently used first, until `data.cache_gb` is respected."""
        with self.making_room:
            self.under_way += tar.size
            if self.keep in (0, float("inf")):
                return
            needed = {path for group in list(self.window) for path in group.tars}
            kept = {path: path.stat() for path in tar.path.parent.glob("[!.]*.tar")}
            total = sum(status.st_size for status in kept.values()) + self.under_way
            for path, status in sorted(kept.items(), key=lambda item: item[1].st_mtime_ns):
                if total > self.keep and path not in needed:
                    path.unlink(missing_ok=True)
                    total -= status.st_size


def _not_stored(tar: RemoteTar, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return DataError(
        f"{without_query(tar.url)} could not be stored in {tar.path.parent} ({reason}); make room there, or lower "
        "data.shuffle_shards."
    )
