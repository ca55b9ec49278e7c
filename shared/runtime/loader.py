"""Batches from worker processes. A worker's MapetError is raised in the reader as itself, without its traceback."""

import atexit
import functools
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import Generator
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ..errors import DataError, MapetError, UsageError
from .compat import shut_down_workers, start_workers, worker_pids
from .console import in_command, stop_signals
from .devices import keep_freed_memory
from .shared_memory import BatchReference, SharedBuffers, free_buffers, no_room


@contextmanager
def _signals_wait() -> Iterator[None]:
    """In a command, delivers the `stop_signals` after the block: a loader that is interrupted while it starts its
    processes cannot clean up and prints a traceback. A library call leaves signal handlers alone."""
    if not in_command() or threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = stop_signals()
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for caught_number in caught:
        signal.raise_signal(caught_number)


_GRACE_SECONDS = 30
"""After SIGTERM a worker goes on serving the reader for this long."""
_MAX_SOCKET_PATH, _SOCKET_PATH = 103, "/pymp-12345678/listener-12345678"
"""Length in bytes of a socket's path that every system accepts, and what multiprocessing appends to the folder."""
_PREFETCHED = 4
"""Batches that each worker loads ahead."""
_open_loaders: WeakSet[Any] = WeakSet()


def _end_workers() -> None:
    for loaded in list(_open_loaders):
        shut_down_workers(loaded)


@functools.cache
def _end_workers_at_exit() -> None:
    """Registers `_end_workers` once. Exit handlers run last in, first out, so it precedes that of multiprocessing,
    which would send the workers SIGTERM and wait until their grace is over."""
    atexit.register(_end_workers)


def _refuse_long_folder() -> None:
    """Raises UsageError if sockets in the temporary folder would have too long a path: workers pass tensors through
    such sockets, and without them batches are lost silently and the reader waits forever."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > _MAX_SOCKET_PATH - len(_SOCKET_PATH):
        raise UsageError(
            f"The temporary folder {folder} has too long a name for the sockets of loader workers; set TMPDIR to a "
            "shorter one, or use no workers."
        )


@dataclass(frozen=True)
class OneByOne:
    """Loads a batch by calling `load(index)` for each of its indices and collating the results."""

    load: Callable[[Any], dict[str, Any]]

    def __call__(self, indices: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = default_collate([self.load(index) for index in indices])
        return batch


class _Guarded(Dataset[Any]):
    """Returns a MapetError of `load` as a batch, for the reader to raise."""

    def __init__(self, load: Callable[[Sequence[Any]], dict[str, Any]]):
        self.load = load
        self.buffers: SharedBuffers | None = None

    def __getitems__(self, indices: Sequence[Any]) -> dict[str, Any] | BatchReference | MapetError:
        try:
            batch = self.load(indices)
            if get_worker_info() is None:
                return batch
            # The loader asks a worker for another batch whenever it has taken one, so one buffer more is enough.
            self.buffers = self.buffers or SharedBuffers(_PREFETCHED + 1)
            return self.buffers.to_shared_memory(batch)
        except MapetError as error:
            return error


def _identity(batch: Any) -> Any:
    return batch


def _begin_worker(worker: int) -> None:
    """Leaves stopping to the reader: terminals and schedulers signal every process, and the reader may need further
    batches.

    When the reader stops, it closes the connection over which the worker sends tensors; that error is not printed.
    """
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.alarm(_GRACE_SECONDS))

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def batches(
    load: Callable[[Sequence[Any]], dict[str, Any]],
    indices: Iterable[Sequence[Any]],
    workers: int,
    pin_memory: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields the batch `load(batch_indices)` for each item of `indices`, in order; tensors keep their strides.

    Args:
        load: loads one batch: names to tensors, or to values that can be pickled.
        indices: the indices of each batch.
        workers: processes that load; with 0 this process loads.
        pin_memory: whether tensors are returned in pinned memory.

    Raises:
        MapetError: what `load` raised, in whichever process.
        UsageError: the path of the temporary folder is too long for the sockets of workers.
        DataError: there is too little shared memory for the batches of workers.
    """
    if workers:
        _refuse_long_folder()
        _end_workers_at_exit()
    loader = DataLoader(
        _Guarded(load),
        batch_sampler=indices,  # type: ignore[arg-type]  # the stubs ask for lists; any sequence works
        # Its own, so that loading does not draw from the caller's random state.
        generator=Generator(),
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        prefetch_factor=_PREFETCHED if workers else None,
        # Forked workers share memory maps; Python's default start method may pickle them instead.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=_begin_worker,
    )
    with _signals_wait():
        loaded = start_workers(loader)
        if workers:
            _open_loaders.add(loaded)
    processes = worker_pids(loaded)
    try:
        for batch in loaded:
            if isinstance(batch, MapetError):
                raise batch
            yield batch.take() if isinstance(batch, BatchReference) else batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _worker_lost(error) from error
    finally:
        # Not left to the iterator's end: the traceback of an error would keep it, and with it the workers.
        shut_down_workers(loaded)
        for process in processes:
            free_buffers(process)


def _worker_lost(error: RuntimeError) -> DataError:
    """The error of a worker that was killed. Before PyTorch 2.11 or so, that is how a full /dev/shm shows."""
    if "Bus error" in f"{error} {error.__cause__}":
        return no_room()
    return DataError(
        "A loader worker ended unexpectedly, perhaps killed for lack of memory; use fewer workers, or give the same "
        "command again."
    )
