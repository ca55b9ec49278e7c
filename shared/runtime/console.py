"""What a command shows: progress and messages on stderr, results on stdout. Outside a command all of it is silent.

`running_command` is the one switch between the two: the command line is inside it, a program that imports the package
is not. Inside it this process may also be changed (signal handlers, the allocator); `in_command` asks for that.

Text may come from file names and files of strangers. Whatever is printed here goes through `printable`, and is never
read as rich's markup or emoji codes.
"""

from __future__ import annotations

import functools
import io
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..printable import printable, printable_json
from .distributed import is_first_process

if TYPE_CHECKING:  # rich takes a while to import, and shell completion needs none of it
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_SECONDS_BETWEEN_PLAIN_LINES = 10.0

log = logging.getLogger("mapet")

_in_command = False


def in_command() -> bool:
    """Whether this process runs a command of `mapet`, and may install signal handlers and tune the allocator."""
    return _in_command


def stop_signals() -> list[signal.Signals]:
    """The signals that end a command in an orderly way: Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 (with which schedulers
    announce the end of a job) and SIGHUP (a terminal that closes). One that was ignored when the command was started,
    such as SIGHUP under nohup, stays ignored, except SIGTERM."""
    numbers = [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
    return [signal.SIGTERM, *(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)]


@contextmanager
def running_command() -> Iterator[None]:
    """Makes this process a command: messages, progress and tables are printed, by rank 0 only.

    The logger "mapet" gets a handler that prints plain lines to stderr, and the root logger one that drops the records
    of other libraries. Characters that the terminal's encoding lacks are printed as escapes instead of failing. All of
    it is undone afterwards. A nested call changes nothing.
    """
    global _in_command
    if _in_command:
        yield
        return
    lines, others = _PlainLines(), logging.NullHandler()
    level, propagate = log.level, log.propagate
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.root.addHandler(others)
    _in_command = True
    try:
        with ExitStack() as undo:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    undo.callback(_set_errors, stream, stream.errors)
                    _set_errors(stream, "backslashreplace")
            yield
    finally:
        _in_command = False
        logging.root.removeHandler(others)
        log.propagate = propagate
        log.setLevel(level)
        log.removeHandler(lines)


def _set_errors(stream: io.TextIOWrapper, errors: str | None) -> None:
    if not stream.closed:
        stream.reconfigure(errors=errors)


def foreign(text: str, style: str = "") -> Text:
    """`text` for rich: no markup, no emoji codes, line breaks and hidden characters as escapes."""
    from rich.text import Text

    return Text(printable(text), style=style)


class _PlainLines(logging.Handler):
    """Prints each record as one plain line to stderr, above a live progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if is_first_process():
            _stderr().print(foreign(record.getMessage()), soft_wrap=True)


class Results:
    """Stdout of a command. Prints nothing outside a command and in processes other than rank 0."""

    @property
    def is_terminal(self) -> bool:
        return _stdout().is_terminal

    @property
    def no_color(self) -> bool:
        return _stdout().no_color

    def print(self, result: str | Text | Table, *, soft_wrap: bool = False) -> None:
        """Prints text, or a table whose text is `foreign` where it is not of this package; `soft_wrap` leaves long
        lines unbroken."""
        if _is_shown():
            _stdout().print(foreign(result) if isinstance(result, str) else result, soft_wrap=soft_wrap)

    def print_json(self, value: Any, indent: int | None = 1) -> None:
        """Prints JSON for machines, as UTF-8 or with escapes for what stdout's encoding lacks; on one line if `indent`
        is None."""
        text = printable_json(value, indent)
        try:
            text.encode(sys.stdout.encoding or "utf-8")
        except UnicodeEncodeError:
            text = json.dumps(value, indent=indent)
        print(text)


results = Results()


def _is_shown() -> bool:
    return _in_command and is_first_process()


@functools.cache
def _stdout() -> Console:
    from rich.console import Console

    # Tables that go to a file or a pipe must not be folded to a guessed terminal's 80 columns.
    return Console(width=None if sys.stdout.isatty() else 120)


@functools.cache
def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def say(text: str) -> None:
    """Logs a message to the logger "mapet" at level INFO; a command prints it as one line on stderr."""
    log.info("%s", printable(text))


class Advance(Protocol):
    """Reports that `steps` more are done; `note` replaces the text beside the bar."""

    def __call__(self, steps: int = 1, note: str | None = None) -> None: ...


@contextmanager
def progress(what: str, total: int | None, unit: str = "images", start: int = 0) -> Iterator[Advance]:
    """Yields `advance(steps, note)`. A command shows a live bar on a terminal, and elsewhere a plain line every ten
    seconds.

    `total` is None while it is unknown; `start` steps were done before.
    """
    if not _is_shown():
        yield lambda steps=1, note=None: None
        return
    show = _bar if _stderr().is_terminal else _plain_lines
    with show(what, total, unit, start) as advance:
        yield advance


@contextmanager
def _bar(what: str, total: int | None, unit: str, start: int) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=_stderr(), transient=True, expand=True) as bar:
        task = bar.add_task(printable(what), total=total, completed=start, unit=unit, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            fields = {} if note is None else {"note": printable(note)}
            bar.update(task, advance=steps, **fields)  # type: ignore[arg-type]  # `fields` has no `total`

        yield advance


@contextmanager
def _plain_lines(what: str, total: int | None, unit: str, start: int) -> Iterator[Advance]:
    began = printed = time.monotonic()
    done = start

    def advance(steps: int = 1, note: str | None = None) -> None:
        nonlocal printed, done
        done += steps
        now = time.monotonic()
        if now - printed >= _SECONDS_BETWEEN_PLAIN_LINES:
            printed = now
            rate = (done - start) / (now - began)
            left = f", {(total - done) / rate:.0f} s left" if rate and total and total > done else ""
            of = "" if total is None else f"/{total}"
            say(f"{what}: {done}{of} {unit}{f', {note}' if note else ''}, {rate:.1f} {unit}/s{left}")

    yield advance


@contextmanager
def working(what: str) -> Iterator[None]:
    """Around a call of unknown length: a command shows a spinner on a terminal and a plain line elsewhere."""
    if not _is_shown():
        yield
    elif _stderr().is_terminal:
        with _stderr().status(foreign(what)):
            yield
    else:
        say(f"{what} ...")
        yield


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """Prints a two-column summary that can be pasted into a lab book to a command's stdout."""
    if not _is_shown():
        return
    from rich.table import Table

    grid = Table(title=foreign(title), title_justify="left", show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(foreign(name), foreign(value))
    results.print(grid)
