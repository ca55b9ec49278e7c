"""Opens NumPy files without unpickling anything."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...shared.errors import DataError


def open_array(path: Path, option: str) -> NDArray[Any]:
    """Memory-maps a .npy file. Raises DataError, which names `option`, if it cannot be read as one array."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{option} {path} cannot be read as a .npy array ({reason}).") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{option} {path} holds several arrays; save the intended one as .npy.")
    return array
