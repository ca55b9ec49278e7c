"""The processes of one command under torchrun: rank, world size, and small collectives.

Without torchrun there is one process, and torch.distributed is not initialised.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

from ..errors import MapetError, UsageError

T = TypeVar("T")
_LONGEST_WAIT = timedelta(days=30)
"""A process may wait for another one that encodes or clusters for days; torchrun ends it if the other one dies."""


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process: every `size`-th one, so that lengths differ by at most one between processes."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Blocks until all processes have called it."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.barrier()

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process; they must be picklable."""
        if self.size == 1:
            return [value]
        import torch.distributed

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
def joined_world(device: str = "cpu") -> Iterator[World]:
    """Yields the world in which torchrun started this process, or a world of one.

    Within the block torch.distributed is initialised, with collectives of tensors on the CPU, and on GPUs if `device`
    is "cuda". Raises UsageError if WORLD_SIZE was set by something other than torchrun.
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
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store, rank, size = next(rendezvous("env://", timeout=_LONGEST_WAIT))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # Without --rdzv-backend c10d, torchrun's store outlives restarts, with the addresses of dead processes in it.
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
    try:
        yield World(torch.distributed.get_rank(), size)
        # gloo may abort a process that still communicates when another one disconnects.
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
