"""The processes of one command under torchrun: which one this is, and the little they say to each other.

Without torchrun there is one process and nothing is started.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from ..errors import MapetError, UsageError

T = TypeVar("T")
# A process may wait while another one encodes or clusters for days; torchrun ends it if that one dies.
_LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share: every `size`-th item, so that all shares are alike in length."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.barrier()

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process (they must be picklable)."""
        if self.size == 1:
            return [value]
        import torch.distributed

        given: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(given, value)
        return given

    def on_rank_zero(self, compute: Callable[[], T]) -> T:
        """What `compute()` gives in the first process, in all processes (it must be picklable).

        If it raises a MapetError there, the first process raises it and the others end quietly with its exit code.
        """
        outcomes = self.all_gather(_outcome(compute) if self.is_first else (None, None))
        self._raise_in_one([error for _, error in outcomes])
        return outcomes[0][0]

    def all_or_raise(self, compute: Callable[[], T]) -> T:
        """`compute()` of each process, once it succeeded in all.

        If it raises a MapetError in some, the lowest of them raises it and the others end quietly with its exit code.
        """
        value, error = _outcome(compute)
        self._raise_in_one(self.all_gather(error))
        return value

    def raise_on_rank_zero(self, error: MapetError) -> NoReturn:
        """Raises an error that all processes have come to: the first one says it, the others end quietly."""
        self.wait()  # nobody leaves while another one still talks to it
        if self.is_first:
            raise error
        raise SystemExit(error.exit_code)

    def _raise_in_one(self, errors: list[MapetError | None]) -> None:
        failed = next((rank for rank, error in enumerate(errors) if error), None)
        if failed is None:
            return
        if failed == self.rank:
            raise errors[failed]
        raise SystemExit(errors[failed].exit_code)


class AsyncFlag:
    """Asks all processes the same question again and again without anybody waiting: answers come one round later."""

    def __init__(self, world: World):
        self._world = world
        self._before: tuple[Any, Any] | None = None

    def ask(self, yes: bool) -> bool:
        """Whether any process said yes in the round before; in a world of one, what it says now.

        All processes must ask equally often, and all get the same answers.
        """
        if self._world.size == 1:
            return yes
        import torch
        import torch.distributed

        said = torch.tensor([int(yes)], dtype=torch.int32)
        work = torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, async_op=True)
        before, self._before = self._before, (work, said)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())


def _outcome(compute: Callable[[], T]) -> tuple[T | None, MapetError | None]:
    try:
        return compute(), None
    except MapetError as error:
        return None, error


def is_first_process() -> bool:
    """Whether this process is the one that speaks: the only one, or torchrun's first."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Which of its node's processes this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined_world(device: str = "cpu") -> Iterator[World]:
    """The world that torchrun started this process in; a world of one if it did not.

    Tensors on the CPU can be exchanged, and with `device` "cuda" those on GPUs.

    Raises UsageError if several processes were announced, but not in torchrun's way.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if "MASTER_ADDR" not in os.environ:
        raise UsageError(
            f"WORLD_SIZE is {size}, but not by torchrun; start several processes with torchrun --no-python."
        )
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=_LONGEST_WAIT))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # Without --rdzv-backend c10d, torchrun keeps its store over restarts, and in it addresses of dead processes.
        store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
    try:
        yield World(torch.distributed.get_rank(), size)
        # gloo may abort a process that is still talking when another one hangs up.
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
