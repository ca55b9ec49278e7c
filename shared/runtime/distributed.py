"""The processes of one command under torchrun: rank, world size, and small collectives.

Without torchrun there is one process, and torch.distributed is not initialised. With it, a process may wait for days
for another one that encodes or clusters, as long as that one lives: each counts up a number in torchrun's store.
Collectives of tensors, in which all processes do the same work, time out after minutes.
"""

import hashlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from ..errors import DataError, MapetError, UsageError

T = TypeVar("T")
_TIMEOUT = "MAPET_TIMEOUT_MINUTES"
_DEFAULT_TIMEOUT = "15"
_SECONDS_BETWEEN_BEATS, _SECONDS_BETWEEN_LOOKS = 5.0, 1.0
_GRACE_SECONDS = 30
"""How long a process may go on after its torchrun was killed: as long as torchrun gives it after SIGTERM."""
_PACKAGE = Path(__file__).parents[2]
_LIBRARIES = ("mapet", "torch", "torchvision", "timm", "open_clip_torch", "numpy", "pillow")
_MAY_DIFFER = ("workers", "data.workers", "data.cache")
"""Arguments and settings that belong to a node."""


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`."""

    rank: int = 0
    size: int = 1
    peers: "_Peers | None" = field(default=None, repr=False, compare=False)
    """The other processes, in a world of several."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process: every `size`-th one, so that lengths differ by at most one between processes."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Blocks until all processes have called it. Raises DataError if one of them lives no more."""
        if self.peers is not None:
            self.peers.meet()

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process; they must be picklable."""
        if self.size == 1:
            return [value]
        import torch.distributed

        self.wait()
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def on_rank_zero(self, compute: Callable[[], T]) -> T:
        """Calls `compute` on rank 0 and returns its value, which must be picklable, on all ranks.

        If it raises a MapetError, rank 0 raises it and the others exit silently with its exit code.
        """
        outcomes = self.all_gather(_outcome(compute) if self.is_first else (None, None))
        self._raise_on_lowest_rank([error for _, error in outcomes])
        return cast(T, outcomes[0][0])

    def all_or_raise(self, compute: Callable[[], T]) -> T:
        """Calls `compute` on all ranks and returns each rank's value once it succeeded on all.

        If it raises a MapetError on some ranks, the lowest of them raises it and the others exit silently with its exit
        code.
        """
        value, error = _outcome(compute)
        self._raise_on_lowest_rank(self.all_gather(error))
        return cast(T, value)

    def refuse_differences(self, values: Mapping[str, object]) -> None:
        """Raises UsageError on rank 0, and exits silently on the others, unless all processes pass the same values.

        The message names the first value that differs; `values` are compared by their `str`.
        """
        different = _difference(self.all_gather({name: _shown(value) for name, value in values.items()}))
        if different:
            self.raise_on_rank_zero(UsageError(different))

    def raise_on_rank_zero(self, error: MapetError) -> NoReturn:
        """For an error that occurs on all ranks: rank 0 raises it, the others exit silently with its exit code."""
        self.wait()  # no process may exit while another one still communicates with it
        if self.is_first:
            raise error
        raise SystemExit(error.exit_code)

    def _raise_on_lowest_rank(self, errors: list[MapetError | None]) -> None:
        for rank, error in enumerate(errors):
            if error is None:
                continue
            if rank == self.rank:
                raise error
            raise SystemExit(error.exit_code)


class AsyncFlag:
    """Tells all processes whether any of them raised a flag, one call later, so that no process has to wait."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Any] | None = None

    def ask(self, yes: bool) -> bool:
        """Whether any process passed True in the previous call; in a world of one, `yes`.

        All processes must call it equally often, and all get the same results.
        """
        if self._world.size == 1:
            return yes
        import torch
        import torch.distributed

        flag = torch.tensor([int(yes)], dtype=torch.int32)
        work = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
        previous, self._pending = self._pending, (work, flag)
        if previous is None:
            return False
        previous_work, previous_flag = previous
        previous_work.wait()
        return bool(previous_flag.item())


def _outcome(compute: Callable[[], T]) -> tuple[T | None, MapetError | None]:
    try:
        return compute(), None
    except MapetError as error:
        return None, error


def is_first_process() -> bool:
    """Whether this process prints for all: the only one, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """The rank of this process on its node; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined_world(device: str = "cpu", given: Mapping[str, object] | None = None) -> Iterator[World]:
    """Yields the world in which torchrun started this process, or a world of one.

    Within the block torch.distributed is initialised, with collectives of tensors on the CPU, and on GPUs if `device`
    is "cuda". In a command, a process whose torchrun was killed ends half a minute later, also inside a collective.

    Args:
        device: "cpu" or "cuda".
        given: the arguments of the command by parameter and its settings by key, which must be the same in all
            processes, as must be the code and the libraries.

    Raises:
        UsageError: WORLD_SIZE was set by something other than torchrun, or the processes were started differently.
        DataError: another process ended or does not answer.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if "MASTER_ADDR" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {size}, but was not set by torchrun; start several processes with torchrun --no-python."
        )
    import torch
    from torch.distributed import PrefixStore  # type: ignore[attr-defined] # documented, not in __all__
    from torch.distributed.rendezvous import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    backend, timeout = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", collective_timeout()
    with peers_explained(World(int(os.environ["RANK"]), size)):
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # Without --rdzv-backend c10d, torchrun's store outlives restarts, with the addresses of dead processes.
            store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        peers = _Peers(PrefixStore("mapet", store), rank, size)
        with peers.watched():
            # Before the group, which processes of different devices could not form.
            peers.refuse_differences({**_described(given or {}), "device": device, **_versions()})
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            try:
                yield World(rank, size, peers)
                # gloo may abort a process that still communicates when another one disconnects.
                peers.meet()
                torch.distributed.barrier()
            finally:
                torch.distributed.destroy_process_group()


def collective_timeout() -> timedelta:
    """How long a collective may take, and how long a process may show no sign of life: MAPET_TIMEOUT_MINUTES."""
    text = os.environ.get(_TIMEOUT, _DEFAULT_TIMEOUT)
    try:
        timeout = timedelta(minutes=float(text))
    except (ValueError, OverflowError):
        timeout = timedelta()
    if timeout <= timedelta():
        raise UsageError(f"{_TIMEOUT} is {text!r}; set it to a number of minutes above 0, or leave it out.")
    return timeout


@contextmanager
def peers_explained(world: World) -> Iterator[None]:
    """Turns the library errors of a process whose peer has ended or does not answer into a DataError."""
    try:
        yield
    except RuntimeError as error:  # of which those of torch.distributed are
        sentence = _explanation(world, error) if world.size > 1 else None
        if sentence is None:
            raise
        raise DataError(sentence) from error


def _explanation(world: World, error: RuntimeError) -> str | None:
    from torch.distributed import DistError

    text = str(error)
    signs = ("gloo", "Connection closed by peer", "NCCL", "Timed out waiting")
    if not isinstance(error, DistError) and not any(sign in text for sign in signs):
        return None
    if "imed out" in text or "timeout" in text.lower():
        minutes = collective_timeout() / timedelta(minutes=1)
        return (
            f"Process {world.rank} of {world.size} waited {minutes:g} minutes for another one, which lives and does "
            f"not answer; see what that one does (py-spy dump), then give the same command again. {_TIMEOUT} sets how "
            "long to wait."
        )
    return (
        f"Process {world.rank} of {world.size} cannot go on, since another one ended; its message says why. Give the "
        "same command to resume from the last checkpoint (torchrun --max-restarts does so by itself)."
    )


class _Peers:
    """The processes of a world, as seen through torchrun's store."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._meetings = 0
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._parent = os.getppid()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Counts up this process's number, and looks after its torchrun, in a thread while the block runs."""
        ended = threading.Event()
        store = self._store.clone()  # a connection of its own: the other one may be waiting
        thread = threading.Thread(target=self._watch, args=(store, ended), name="mapet-peers", daemon=True)
        store.set(f"alive/{self._rank}", "0")
        thread.start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, store: Any, ended: threading.Event) -> None:
        beats, last = 0, time.monotonic()
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            if os.getppid() != self._parent and _in_command():
                _end_orphan(ended)
                return
            if time.monotonic() - last >= _SECONDS_BETWEEN_BEATS:
                beats, last = beats + 1, time.monotonic()
                with suppress(RuntimeError):  # the store ended with torchrun; `meet` says so
                    store.set(f"alive/{self._rank}", str(beats))

    def refuse_differences(self, mine: Mapping[str, str]) -> None:
        """As `World.refuse_differences`, before there is a process group."""
        self._store.set(f"start/{self._rank}", json.dumps(mine))
        all_of_them = [json.loads(self._store.get(f"start/{rank}")) for rank in range(self._size)]
        different = _difference(all_of_them)
        self.meet()
        if different and self._rank == 0:
            raise UsageError(different)
        if different:
            raise SystemExit(UsageError.exit_code)

    def meet(self) -> None:
        """Blocks until all processes have called it, however long that takes. DataError if one lives no more."""
        self._meetings += 1
        key, pause = f"meeting/{self._meetings}", 0.0005
        arrived = self._store.add(key, 1)
        looked = time.monotonic()
        while arrived < self._size:
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            arrived = self._store.add(key, 0)
            if time.monotonic() - looked > _SECONDS_BETWEEN_BEATS:
                looked = time.monotonic()
                self._refuse_the_dead()

    def _refuse_the_dead(self) -> None:
        now = time.monotonic()
        longest = max(collective_timeout(), 6 * timedelta(seconds=_SECONDS_BETWEEN_BEATS))
        for rank in range(self._size):
            key = f"alive/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            before, since = self._beats.get(rank, (None, now))
            self._beats[rank] = (beat, now if beat != before else since)
            if now - self._beats[rank][1] > longest.total_seconds():
                raise DataError(
                    f"Process {rank} of {self._size} has shown no sign of life for {longest / timedelta(minutes=1):g} "
                    "minutes; see whether its machine is up, then give the same command again."
                )


def _in_command() -> bool:
    from .console import in_command  # which imports this module

    return in_command()


def _end_orphan(ended: threading.Event) -> None:
    """Ends a process whose torchrun was killed: as a command is ended, and without regard if that takes too long."""
    print("mapet: torchrun was killed; this process ends, too.", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    if not ended.wait(_GRACE_SECONDS):
        os._exit(1)


def _described(given: Mapping[str, object]) -> dict[str, str]:
    """The arguments and settings that must be the same in all processes, as they are given and as text."""
    return {
        name if "." in name else f"--{name.replace('_', '-')}": _shown(value)
        for name, value in given.items()
        if name not in _MAY_DIFFER
    }


def _shown(value: object) -> str:
    """A value as a message may show it: a digest of one that is long, or a URL, which may hold secrets."""
    text = str(value)
    if len(text) > 100 or "://" in text or not text.isprintable():
        return f"a value of digest {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:12]}"
    return text


def _versions() -> dict[str, str]:
    versions = {"the version of Python": platform.python_version()}
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[f"the version of {library}"] = version(library)
    code = hashlib.sha256()
    for path in sorted(path for room in ("shared", "*_stage") for path in _PACKAGE.glob(f"{room}/**/*.py")):
        code.update(path.read_bytes())
    return {**versions, "the digest of mapet's code": code.hexdigest()[:12]}


def _difference(all_of_them: Sequence[Mapping[str, str]]) -> str | None:
    """A sentence about the first value in which a process differs from the first one; None if all are the same."""
    first = all_of_them[0]
    for rank, other in enumerate(all_of_them):
        for name in dict.fromkeys([*first, *other]):
            here, there = first.get(name, "not given"), other.get(name, "not given")
            if here != there:
                return (
                    f"The processes of one torchrun must be started alike: {name} is {here} in process 0 and {there} "
                    f"in process {rank}; give all of them the same."
                )
    return None
