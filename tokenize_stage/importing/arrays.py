"""NumPy files, opened without running anything in them."""

from pathlib import Path

import numpy as np

from ...shared.errors import DataError


def open_array(path: Path, option: str) -> np.ndarray:
    """A .npy file, left on disk; DataError if it is none."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{option} {path} cannot be read as a .npy array ({reason}).") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{option} {path} holds several arrays; save the one that is meant as .npy.")
    return array
