"""Random draws that depend on names alone, not on order, rank, workers or restarts."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def generator(*names: object) -> np.random.Generator:
    """A numpy Generator (Philox) seeded by `names`, such as (seed, "permutation", epoch, key)."""
    text = "\x1f".join(map(str, names))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Initial weights that are drawn inside depend on `seed` alone; PyTorch's random state on the CPU is restored."""
    import torch  # takes seconds

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        yield
