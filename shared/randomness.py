"""Random draws that depend on names alone, not on order, rank, workers or restarts."""

import hashlib

import numpy as np


def generator(*names: object) -> np.random.Generator:
    """A numpy Generator (Philox) seeded by `names`, such as (seed, "permutation", epoch, key)."""
    text = "\x1f".join(map(str, names))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
