"""Random draws that depend on names alone, not on order, rank, workers or restarts."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import DTypeLike, NDArray


class _Key(ISeedSequence):
    """The key of a Philox. `Philox(key=...)` has the same one, and reads the system's entropy before, for nothing."""

    def __init__(self, key: NDArray[np.uint64]) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: DTypeLike = np.uint32) -> NDArray[np.uint64]:
        return self._key


def generator(*names: object) -> np.random.Generator:
    """A numpy Generator (Philox) seeded by `names`, such as (seed, "permutation", epoch, key)."""
    text = "\x1f".join(map(str, names))
    key = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype="<u8")
    # NumPy's annotations name no ISeedSequence here, which its documentation does.
    return np.random.Generator(np.random.Philox(_Key(key)))  # type: ignore[arg-type]


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Initial weights that are drawn inside depend on `seed` alone; PyTorch's random state on the CPU is restored."""
    import torch  # takes seconds

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        yield
