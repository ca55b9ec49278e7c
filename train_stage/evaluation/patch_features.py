"""Patch features of many images, in a temporary file rather than in memory."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...shared.errors import DataError
from ...shared.runtime.memory import as_text

DTYPE = "float16"


@dataclass(frozen=True, eq=False)
class PatchFeatures:
    """The patch features of n images, read-only."""

    values: NDArray[np.float16]
    """(n, N, dim), mapped from a file without a name, which disappears with this object."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, dim) of one image."""
        return self.values.shape[1], self.values.shape[2]

    def rows(self, indices: Tensor | Sequence[int] | range) -> Tensor:
        """(B, N, dim) float32 on the CPU, of the images at these indices."""
        return torch.from_numpy(np.array(self.values[np.asarray(indices)])).float()


class PatchWriter:
    """Collects the patch features of `count` images. Raises DataError if the temporary folder has too little room."""

    def __init__(self, count: int):
        self._count = count
        self._file = cast(BinaryIO, tempfile.TemporaryFile(prefix="mapet-"))  # noqa: SIM115  # lives on in `finish`
        self._shape: tuple[int, ...] | None = None

    def write(self, features: Tensor) -> None:
        """Appends the float16 features (B, N, dim) of the next images."""
        if self._shape is None:
            self._shape = tuple(features.shape[1:])
            needed = self._count * features[0].nbytes
            if needed > shutil.disk_usage(tempfile.gettempdir()).free:
                raise self._too_large("that is more than is free")
        try:
            self._file.write(features.contiguous().cpu().numpy().data)
        except OSError as error:
            raise self._too_large(os.strerror(error.errno or 0)) from None

    def finish(self) -> PatchFeatures:
        """What was written."""
        assert self._shape is not None
        try:
            self._file.flush()
        except OSError as error:
            raise self._too_large(os.strerror(error.errno or 0)) from None
        shape = (self._count, *self._shape)
        return PatchFeatures(np.memmap(self._file, dtype=np.float16, mode="r", shape=shape))

    def _too_large(self, reason: str) -> DataError:
        assert self._shape is not None
        size = as_text(self._count * self._shape[0] * self._shape[1] * 2)
        return DataError(
            f"The patch features of {self._count:,} images take {size} in the temporary folder "
            f"{tempfile.gettempdir()} ({reason}); make room there, set TMPDIR to another folder or give fewer images."
        )
