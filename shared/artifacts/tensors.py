"""Opens safetensors files from elsewhere: names, types and sizes are checked before a tensor is loaded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from upath import UPath

from ..errors import DataError
from ..storage.bounded import refuse_irregular

Shapes = dict[str, tuple[int, ...]]
"""The shape of each tensor of a file."""
FLOATS = ("F64", "F32", "F16", "BF16")


@contextmanager
def tensor_errors(path: Path | UPath | str, remedy: str) -> Iterator[None]:
    """Turns what safetensors raises for damaged or impossible content into a DataError about `path`."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read as safetensors ({reason[:200]}); {remedy}.") from None


def read_shapes(path: Path, remedy: str, dtypes: tuple[str, ...] = FLOATS) -> Shapes:
    """The shapes of the tensors in a local file, from its header alone.

    Raises:
        DataError if the file is missing or damaged, or a tensor has a type that is not among `dtypes`.
    """
    refuse_irregular(path)
    with tensor_errors(path, remedy), safe_open(path, "numpy") as file:
        slices: Mapping[str, Any] = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    for name, (_, dtype) in found.items():
        if dtype not in dtypes:
            raise DataError(
                f"{path} has the tensor {name[:200]!r} of type {dtype}; expected {' or '.join(dtypes)}; {remedy}."
            )
    return {name: shape for name, (shape, _) in found.items()}


def refuse_other_tensors(path: Path | str, found: Shapes, expected: Mapping[str, tuple[int, ...]], remedy: str) -> None:
    """Raises DataError unless a file holds exactly the expected tensors; the message names the first that differs."""
    for name in sorted(expected.keys() | found.keys()):
        there, needed = found.get(name), expected.get(name)
        if there != needed:
            shown = "no tensor" if there is None else f"a tensor of shape {there}"
            wanted = "none" if needed is None else f"one of shape {needed}"
            raise DataError(f"{path} has {shown} {name[:200]!r}, and {wanted} belongs there; {remedy}.")
