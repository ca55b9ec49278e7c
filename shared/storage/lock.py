"""The lock that a command holds on what it writes, from before it looks at it until it ends."""

import errno
import functools
import hashlib
import inspect
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import filelock
import msgspec
from upath import UPath

from ..errors import UsageError
from .files import not_written
from .remote import as_path, is_remote

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_LONGEST_WAIT = 60.0
_SECONDS_BETWEEN_TRIES = 0.2
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""How file systems that have no locks refuse one."""

_log = logging.getLogger("mapet")


class Ranks(Protocol):
    """What the lock needs of `shared.runtime.distributed.World`."""

    @property
    def rank(self) -> int: ...

    def on_rank_zero(self, compute: Callable[[], T]) -> T: ...


class _OneProcess:
    rank = 0

    def on_rank_zero(self, compute: Callable[[], T]) -> T:
        return compute()


class Holder(msgspec.Struct):
    """The process that holds a lock, as stated in the file beside it."""

    command: str
    host: str
    pid: int
    since: str

    def __str__(self) -> str:
        return f"{self.command}, process {self.pid} on {self.host}, since {self.since}"


@contextmanager
def sole_writer(out: Path | UPath, world: Ranks | None = None, *, option: str = "--out") -> Iterator[None]:
    """Holds the lock on the file or folder `out` while the block runs; the processes of one `world` count as one.

    To be entered before `out` is looked at, so that a command that waited for another one sees what that one wrote. The
    lock is the file `.NAME.lock` beside `out`, locked by the kernel: the file of a killed process blocks nobody, and
    `.NAME.lock.json` names the holder. Where the folder above cannot be written the lock is inside `out`; for a URL it
    is in the temporary folder of this machine, and processes of other machines are not kept out. File systems without
    locks are written to without one, and a message says so.

    Raises:
        UsageError: another process holds the lock and has not released it within a minute. `option` is the option that
            gave `out`.
        DataError: the folder of `out` cannot be written.
    """
    place = _LockPlace.of(out)
    world = world or _OneProcess()
    with ExitStack() as held:
        held.callback(place.remove_empty_folders)
        world.on_rank_zero(lambda: _discard(held.enter_context(_first_lock(place, out, option))))
        if world.rank:
            # The first process of the next torchrun waits for it: rank 0 of this one may end before the others do.
            held.enter_context(_rank_lock(place, world.rank))
        yield


@contextmanager
def claimed(out: Path) -> Iterator[bool]:
    """Takes the lock of `sole_writer` on `out` without waiting, and holds it while the block runs.

    Yields False, holding nothing, if another process has it. On a file system without locks it yields True.

    Raises:
        DataError: the folder of `out` cannot be written.
    """
    place = _LockPlace.of(out)
    lock = filelock.FileLock(place.lock, thread_local=False)
    is_claimed = True
    with _explained(out):
        place.make_folder()
        try:
            _acquire(lock, place.lock, 0)
        except filelock.Timeout:
            is_claimed = False
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        except NotImplementedError:
            pass
    try:
        yield is_claimed
    finally:
        _release(lock, place.lock)


def writes_to_out(function: Callable[P, R]) -> Callable[P, R]:
    """Makes a function of one process hold the lock of its parameter `out` while it runs (see `sole_writer`)."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        with sole_writer(as_path(bound.arguments["out"])):
            return function(*args, **kwargs)

    return locked


def _discard(_: Any) -> None:
    """Results of rank 0 go to all ranks and must be picklable."""


class _LockPlace:
    """Where the lock files of one output are."""

    def __init__(self, folder: Path, name: str) -> None:
        self.lock = folder / f".{name}.lock"
        self.holder = folder / f".{name}.lock.json"
        self._made: list[Path] = []

    @classmethod
    def of(cls, out: Path | UPath) -> "_LockPlace":
        if is_remote(out):
            folder = Path(tempfile.gettempdir(), f"mapet-locks-{os.getuid()}")
            return cls(folder, hashlib.sha256(str(out).rstrip("/").encode()).hexdigest()[:32])
        real = Path(os.path.realpath(out))
        if not real.name or (real.is_dir() and not os.access(real.parent, os.W_OK)):
            return cls(real, "")
        return cls(real.parent, real.name)

    def make_folder(self) -> None:
        """Makes the folder of the lock file and remembers which folders did not exist."""
        missing = [self.lock.parent, *self.lock.parent.parents]
        self._made = [folder for folder in missing if not folder.exists()]
        self.lock.parent.mkdir(parents=True, exist_ok=True)

    def remove_empty_folders(self) -> None:
        """Removes the folders that were made for a lock if the command wrote nothing."""
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def of_rank(self, rank: int) -> Path:
        return self.lock.with_name(f"{self.lock.name}-{rank}")

    def of_ranks(self) -> list[Path]:
        return sorted(self.lock.parent.glob(f"{self.lock.name}-*"))


@contextmanager
def _first_lock(place: _LockPlace, out: Path | UPath, option: str) -> Iterator[None]:
    """The lock of the only process or of rank 0, once the ranks of an earlier torchrun have ended, too."""
    deadline = time.monotonic() + _LONGEST_WAIT
    with ExitStack() as held:
        with _explained(out):
            place.make_folder()
            held.enter_context(_acquired(place, place.lock, out, option, deadline))
            for left in place.of_ranks():
                with _acquired(place, left, out, option, deadline):
                    pass
            with suppress(OSError):
                place.holder.write_bytes(msgspec.json.encode(_this_process()))
            held.callback(place.holder.unlink, missing_ok=True)
        yield


@contextmanager
def _rank_lock(place: _LockPlace, rank: int) -> Iterator[None]:
    path = place.of_rank(rank)
    lock = filelock.FileLock(path, thread_local=False)
    with suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path, 0)
    try:
        yield
    finally:
        _release(lock, path)


@contextmanager
def _acquired(place: _LockPlace, path: Path, out: Path | UPath, option: str, deadline: float) -> Iterator[None]:
    lock = filelock.FileLock(path, thread_local=False)
    try:
        _acquire_or_refuse(lock, path, place, out, option, deadline)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
            raise
        _log.info("The file system of %s has no locks: make sure that no other process writes to it.", out)
    try:
        yield
    finally:
        _release(lock, path)


def _acquire_or_refuse(
    lock: filelock.BaseFileLock, path: Path, place: _LockPlace, out: Path | UPath, option: str, deadline: float
) -> None:
    try:
        _acquire(lock, path, 0)
    except filelock.Timeout:
        _log.info("Waiting up to a minute, as another process is writing to %s%s.", out, _held_by(place))
        try:
            _acquire(lock, path, deadline - time.monotonic())
        except filelock.Timeout:
            raise UsageError(
                f"Another process is writing to {out}{_held_by(place)}; wait until it ends or choose another {option}."
            ) from None


def _acquire(lock: filelock.BaseFileLock, path: Path, seconds: float) -> None:
    """Locks the file that is at `path`, or raises filelock.Timeout. A holder deletes its file, so that a process that
    waited for it may get the lock of a file that is gone, while another process locks a new one."""
    deadline = time.monotonic() + max(seconds, 0)
    while True:
        before = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock.acquire(timeout=max(deadline - time.monotonic(), 0), poll_interval=_SECONDS_BETWEEN_TRIES)
            # One file at both times: it was there in between, too, since a number is not used again while it is open.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(before), path.stat()):
                    return
            lock.release()
        finally:
            os.close(before)


def _release(lock: filelock.BaseFileLock, path: Path) -> None:
    if lock.is_locked:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()


def _held_by(place: _LockPlace) -> str:
    try:
        text = str(msgspec.json.decode(place.holder.read_bytes(), type=Holder))
    except (OSError, msgspec.MsgspecError):
        return ""
    return f" ({text})" if text.isprintable() else ""


def _this_process() -> Holder:
    # Arguments are left out: URLs among them may hold secrets.
    program = Path(sys.argv[0]).name
    words = [word for word in sys.argv[1:3] if word.replace("-", "").isalpha() and not word.startswith("-")]
    command = " ".join(["mapet", *words]) if program in ("mapet", "-c") else program
    now = datetime.now().astimezone()
    return Holder(command or "python", socket.gethostname(), os.getpid(), now.isoformat(" ", "seconds"))


@contextmanager
def _explained(out: Path | UPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise not_written(out, error.errno or 0, error.strerror or str(error)) from None
