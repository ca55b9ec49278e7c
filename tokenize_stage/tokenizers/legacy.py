"""Reads a pickled module of DALL-E from PyTorch's legacy container, in which even PyTorch's weights-only unpickler
refuses modules; nothing in it is executed."""

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MAGIC = 0x1950A86A20F9469CFC6C
_DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "DoubleStorage": torch.float64}
_HARMLESS = {("collections", "OrderedDict"): OrderedDict, ("builtins", "set"): set, ("__builtin__", "set"): set}


@dataclass(frozen=True)
class _Strided:
    """A tensor whose storage has not been read yet."""

    key: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Knows inert classes only: whatever a pickle calls, sets or builds, no other code can be reached."""

    def __init__(self, file: Any, classes: frozenset[str], inert: type):
        super().__init__(file)
        self.classes, self.inert = classes, type("Inert", (inert,), {})
        self.dtypes: dict[str, torch.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) == ("torch", "device"):
            return lambda *arguments: arguments
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *others: tensor
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda key, offset, size, stride, *others: _Strided(key, offset, tuple(size), tuple(stride))
        if f"{module}.{name}" in self.classes:
            return self.inert
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # (its class, the file and the text of its source)
            return pid[1]
        if pid[0] != "storage":
            raise pickle.UnpicklingError(f"{pid[0]} is not allowed")
        key = str(pid[2])
        self.dtypes[key] = _DTYPES[pid[1]]
        return key


def read_legacy(path: Path, classes: frozenset[str], inert: type) -> tuple[Any, dict[_Strided, Tensor]]:
    """The pickled object of a legacy container, and the tensors that stand in it as placeholders.

    `classes` are the full names of classes whose objects become `inert` ones. Raises UnpicklingError for any other
    class, and whatever damaged bytes cause.
    """
    with path.open("rb") as file:
        magic, _, _ = (_Reader(file, frozenset(), inert).load() for _ in range(3))
        if magic != _MAGIC:
            raise pickle.UnpicklingError("not a legacy container")
        reader = _Reader(file, classes, inert)
        content = reader.load()
        storages = {}
        for key in _Reader(file, frozenset(), inert).load():
            dtype = reader.dtypes[str(key)]
            count = int.from_bytes(file.read(8), "little")
            storages[str(key)] = torch.frombuffer(bytearray(file.read(count * dtype.itemsize)), dtype=dtype)
    return content, _Tensors(storages)


class _Tensors(dict[_Strided, Tensor]):
    """Tensors by their placeholders, made when they are asked for."""

    def __init__(self, storages: dict[str, Tensor]):
        super().__init__()
        self.storages = storages

    def __missing__(self, placeholder: _Strided) -> Tensor:
        storage = self.storages[placeholder.key]
        return torch.as_strided(storage, placeholder.size, placeholder.stride, placeholder.offset)
