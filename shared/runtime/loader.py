"""Batches from worker processes, with errors that arrive as one sentence and not as a worker's traceback."""

import atexit
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from torch import Generator
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ..errors import MapetError, UsageError
from .compat import shut_down_workers, start_workers, worker_pids
from .devices import keep_freed_memory
from .shared_memory import BatchReference, SharedBuffers, free_buffers


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Delivers Ctrl-C and SIGTERM after the block: a loader that is interrupted while it starts its processes cannot
    clean up and prints a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in caught:
        signal.raise_signal(number)


_GRACE_SECONDS = 30
"""How long a worker that was asked to stop goes on serving a reader that does not end."""
_LONGEST_SOCKET, _SOCKET_IN_IT = 103, "/pymp-12345678/listener-12345678"
"""Bytes of a socket's name that every system takes, and how multiprocessing calls one."""
_PREFETCHED = 4
"""Batches that each worker loads ahead."""
_open_loaders: WeakSet = WeakSet()


@atexit.register
def _end_workers() -> None:
    """Before multiprocessing ends them with the signal that they wait after."""
    for loaded in list(_open_loaders):
        shut_down_workers(loaded)


def _refuse_long_folder() -> None:
    """Workers hand tensors over through sockets in the temporary folder; where its name is too long for one, what they
    load is lost without a word and the reader waits forever."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > _LONGEST_SOCKET - len(_SOCKET_IN_IT):
        raise UsageError(
            f"The temporary folder {folder} has too long a name for the sockets of loader workers; set TMPDIR to a "
            "shorter one, or use no workers."
        )


@dataclass(frozen=True)
class OneByOne:
    """Loads a batch as the collated `load(index)` of each of its indices."""

    load: Callable[[Any], dict]

    def __call__(self, indices: Sequence[Any]) -> dict:
        return default_collate([self.load(index) for index in indices])


class _Guarded(Dataset):
    def __init__(self, load: Callable[[Sequence[Any]], dict]):
        self.load = load
        self.buffers: SharedBuffers | None = None

    def __getitems__(self, indices: Sequence[Any]) -> dict | BatchReference | MapetError:
        try:
            batch = self.load(indices)
            if get_worker_info() is None:
                return batch
            # PyTorch's loader asks a worker for another batch whenever one of its batches was taken.
            self.buffers = self.buffers or SharedBuffers(_PREFETCHED + 1)
            return self.buffers.to_shared_memory(batch)
        except MapetError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(worker: int) -> None:
    """Leaves stopping to the reader: a terminal and a scheduler ask all processes, and it may need further batches.

    When it stops it closes the connection over which a worker hands out tensors; that is no news.
    """
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, ConnectionError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def batches(
    load: Callable[[Sequence[Any]], dict], indices: Iterable[Sequence[Any]], workers: int, pin_memory: bool = False
) -> Iterator[dict]:
    """Yields the dict `load(some)` for each list `some` in `indices`, in order, loaded by `workers` processes.

    Tensors keep their strides.

    Raises the MapetError that `load` raised, whichever process it happened in, UsageError if workers could not hand
    anything over, and DataError if there is too little shared memory for that.
    """
    if workers:
        _refuse_long_folder()
    loader = DataLoader(
        _Guarded(load),
        batch_sampler=indices,
        # Its own, so that loading does not draw from the caller's random state.
        generator=Generator(),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=_PREFETCHED if workers else None,
        # Workers inherit what is mapped into memory; Python's own choice may be to pickle it.
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
    finally:
        # Not left to the iterator's end: the traceback of an error would keep it, and with it the workers.
        shut_down_workers(loaded)
        for process in processes:
            free_buffers(process)
