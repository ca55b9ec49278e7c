"""Shared memory through which worker processes return batches; it is reused from batch to batch.

New shared memory for every batch, as PyTorch's loader allocates it, would take a tenth of the time in which a
photograph is decoded, because the kernel first clears its pages.
"""

import os
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError
from .memory import as_text

_ALIGNMENT = 64
"""Bytes; offsets of tensors in a buffer are multiples of it."""


class Place(NamedTuple):
    """Where a tensor is in a buffer: the offset is in bytes, strides are in elements."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]


@dataclass(frozen=True)
class SharedBuffer:
    """Shared memory for the tensors of one batch."""

    memory: Tensor
    places: dict[str, Place]

    def views(self) -> dict[str, Tensor]:
        """The tensors by name, in the buffer's memory."""
        views = {}
        for name, (offset, dtype, shape, strides) in self.places.items():
            piece = self.memory[offset : offset + shape.numel() * dtype.itemsize]
            views[name] = piece.view(dtype).as_strided(shape, strides)
        return views


_buffers_of_workers: dict[int, dict[int, SharedBuffer]] = defaultdict(dict)
"""In the reader: the buffers of each worker, by its process id."""


@dataclass(frozen=True)
class BatchReference:
    """Sent instead of a batch: the number of the worker's buffer with its tensors, and the buffer if it is new."""

    process: int
    """The worker's process id."""
    number: int
    buffer: SharedBuffer | None
    rest: dict[str, Any]
    """The values of the batch that are not tensors."""

    def take(self, pinned: bool = False) -> dict[str, Any]:
        """The batch, copied out of the buffer (into pinned memory if `pinned`); tensors keep their strides."""
        buffers = _buffers_of_workers[self.process]
        if self.buffer is not None:
            buffers[self.number] = self.buffer
        views = buffers[self.number].views()
        return {name: view.pin_memory() if pinned else view.clone() for name, view in views.items()} | self.rest

    def pin_memory(self) -> dict[str, Any]:
        """The batch in pinned memory; PyTorch's loader calls this in a thread."""
        return self.take(pinned=True)


def free_buffers(process: int) -> None:
    """Frees the buffers of a worker that has ended."""
    _buffers_of_workers.pop(process, None)


class SharedBuffers:
    """A worker's ring of `count` buffers.

    The reader must take a batch before it requests the one that comes `count` batches later.
    """

    def __init__(self, count: int) -> None:
        self._buffers: dict[int, SharedBuffer] = {}
        self._count, self._turn = count, 0

    def to_shared_memory(self, batch: dict[str, Any]) -> BatchReference:
        """Copies the tensors of a batch into the next buffer. Raises DataError if there is too little shared memory."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        number, self._turn = self._turn, (self._turn + 1) % self._count
        places, size = _arrange(tensors)
        buffer, new = self._buffers.get(number), None
        if buffer is None or buffer.places != places:
            buffer = new = self._buffers[number] = SharedBuffer(_shared(size), places)
        for name, view in buffer.views().items():
            view.copy_(tensors[name])
        return BatchReference(os.getpid(), number, new, {name: batch[name] for name in batch if name not in tensors})


def _shared(size: int) -> Tensor:
    """Shared memory of `size` bytes; DataError if there is too little, as in many containers."""
    memory = torch.empty(size, dtype=torch.uint8)
    try:
        memory.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise no_room(as_text(size)) from None
    return memory


def no_room(size: str | None = None) -> DataError:
    """The error of too little shared memory for a batch of `size`, if that is known."""
    batch = "another batch" if size is None else f"another batch ({size})"
    return DataError(
        f"There is no room in /dev/shm for {batch} of a loader worker; allow more shared memory (docker run "
        "--shm-size=8g), or use fewer workers or smaller batches (execution.micro_batch)."
    )


def _arrange(tensors: dict[str, Tensor]) -> tuple[dict[str, Place], int]:
    """Places for the tensors, one after the other, and how many bytes they take together."""
    places, end = {}, 0
    for name, tensor in tensors.items():
        strides = torch.empty_like(tensor, device="meta").stride()  # those of `tensor`, without gaps
        places[name] = Place(end, tensor.dtype, tensor.shape, strides)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, max(end, 1)
