"""Random draws as a pure function of names, never of order, rank, workers or restarts."""

import hashlib

import numpy as np


def generator(*names: object) -> np.random.Generator:
    """A numpy Generator (Philox) determined by `names` alone, such as (seed, "permutation", epoch, key)."""
    text = "\x1f".join(map(str, names))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
