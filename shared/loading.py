"""Batches from worker processes, with errors that arrive as one sentence and not as a worker's traceback."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from .errors import MapetError


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


class _Guarded(Dataset):
    def __init__(self, load: Callable[[Any], Any]):
        self.load = load

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.load(index)
        except MapetError as error:
            return error


def _keep_quiet_once_the_reader_is_gone(worker: int) -> None:
    """A stopped command closes the connection over which a worker hands out tensors; that is no news."""

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, ConnectionError):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def _collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, MapetError)), None) or default_collate(samples)


def batches(
    load: Callable[[Any], dict], indices: Iterable[Sequence[Any]], workers: int, pin_memory: bool = False
) -> Iterator[dict]:
    """Yields the collated `load(index)` for each list in `indices`, in order, loaded by `workers` processes.

    Raises the MapetError that `load` raised, whichever process it happened in.
    """
    loader = DataLoader(
        _Guarded(load),
        batch_sampler=indices,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_keep_quiet_once_the_reader_is_gone,
    )
    with _signals_wait():
        loaded = iter(loader)
    for batch in loaded:
        if isinstance(batch, MapetError):
            raise batch
        yield batch
