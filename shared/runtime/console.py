"""What a person sees: progress on stderr, results on stdout."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .distributed import is_first_process

_SECONDS_BETWEEN_PLAIN_LINES = 10.0

# Tables that go to a file or a pipe must not be folded to a guessed terminal's 80 columns.
results = Console(width=None if sys.stdout.isatty() else 120, quiet=not is_first_process())
# Under torchrun the first process speaks for all; errors are printed elsewhere, by every process.
messages = Console(stderr=True, quiet=not is_first_process())

Advance = Callable[..., None]


def say(text: str) -> None:
    """One line of news on stderr, so that stdout holds results only."""
    messages.print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def progress(what: str, total: int | None, unit: str = "images", start: int = 0) -> Iterator[Advance]:
    """Yields `advance(steps, note="")`. A live bar on a terminal; elsewhere a plain line every ten seconds.

    `total` is None where nobody knows it yet.
    """
    show = _bar if messages.is_terminal else _plain_lines
    with show(what, total, unit, start) as advance:
        yield advance


@contextmanager
def _bar(what: str, total: int | None, unit: str, start: int) -> Iterator[Advance]:
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=messages, transient=True, expand=True) as bar:
        task = bar.add_task(what, total=total, completed=start, unit=unit, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            bar.update(task, advance=steps, **({} if note is None else {"note": note}))

        yield advance


@contextmanager
def _plain_lines(what: str, total: int | None, unit: str, start: int) -> Iterator[Advance]:
    began = said = time.monotonic()
    done = start

    def advance(steps: int = 1, note: str | None = None) -> None:
        nonlocal said, done
        done += steps
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_PLAIN_LINES:
            said = now
            rate = (done - start) / (now - began)
            left = f", {(total - done) / rate:.0f} s left" if rate and total and total > done else ""
            of = "" if total is None else f"/{total}"
            say(f"{what}: {done}{of} {unit}{f', {note}' if note else ''}, {rate:.1f} {unit}/s{left}")

    yield advance


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on a terminal, a plain line elsewhere, around a call that cannot tell how far it is."""
    if messages.is_terminal:
        with messages.status(what):
            yield
    else:
        say(f"{what} ...")
        yield


def table(title: str, rows: list[tuple[str, str]]) -> None:
    """A two-column summary on stdout that can be pasted into a lab book."""
    grid = Table(title=title, title_justify="left", show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    results.print(grid)
