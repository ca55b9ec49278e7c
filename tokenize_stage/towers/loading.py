"""Helpers to open a model of any library: seeded random weights, no log output, and one-sentence errors."""

import difflib
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ...shared.errors import DataError, MapetError, UsageError
from .tower import TowerSettings

RANDOM = "none"
"""The value of --pretrained that means seeded random weights."""
_SEED_OF_RANDOM_WEIGHTS = 0
_OUR_LOGGERS = __name__.partition(".")[0]


@contextmanager
def seeded_if(random: bool) -> Iterator[None]:
    """Makes random weights the same each time the tower is opened. The caller's random state stays as it is."""
    with torch.random.fork_rng():
        if random:
            torch.manual_seed(_SEED_OF_RANDOM_WEIGHTS)
        yield


def unknown_name(kind: str, name: str, known: list[str]) -> UsageError:
    """An error that names the known names most like `name`."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return UsageError(f"{kind} {name!r} is unknown; did you mean {', '.join(close or known[:5])}?")


class _NotFromThread(logging.Filter):
    """Drops what libraries log in one thread; other threads and this package's own loggers are not affected."""

    def __init__(self, thread: int):
        super().__init__()
        self._thread = thread

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread or record.name.partition(".")[0] == _OUR_LOGGERS


class _LastResort(logging.Handler):
    """Stands in for `logging.lastResort` on a root logger without handlers.

    Without it the first `logging.warning()` of open_clip would install a handler there for good.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if logging.lastResort and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


@contextmanager
def libraries_silenced() -> Iterator[None]:
    """Keeps what libraries log or warn about in this thread from every handler; leaves logging as it was."""
    quiet = _NotFromThread(threading.get_ident())
    with ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if not logging.root.handlers:
            stand_in = _LastResort()
            logging.root.addHandler(stand_in)
            undo.callback(logging.root.removeHandler, stand_in)
        named = list(logging.root.manager.loggerDict.values())  # a copy, as other threads may add to it
        loggers = [logger for logger in named if isinstance(logger, logging.Logger)]
        for handler in {handler for logger in (logging.root, *loggers) for handler in logger.handlers}:
            handler.addFilter(quiet)
            undo.callback(handler.removeFilter, quiet)
        yield


@contextmanager
def library_errors_explained(settings: TowerSettings) -> Iterator[None]:
    """Turns any exception of a library that opens a model into one sentence, and silences its log output."""
    try:
        with libraries_silenced():
            yield
    except MapetError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise DataError(
            f"The weights of --tower {settings.tower} (--pretrained {settings.pretrained}) could not be fetched or "
            f"loaded: {reason}."
        ) from error
