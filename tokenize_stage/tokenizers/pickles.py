"""Reads the tensors of published files; nothing in a pickle is executed."""

import argparse
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...shared.artifacts.pickled import refuse_compressed, refuse_expanded
from ...shared.errors import DataError
from .legacy import read_legacy

_DEEPEST = 16
"""Modules within modules of a pickled network; the dVAE has five."""


class _Inert:
    """Stands in for the classes of a pickled network: it has no behaviour, only the attributes that were pickled."""

    dump_patches = False  # what PyTorch asks of the classes in its legacy container


_NETWORK_CLASSES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.pooling.MaxPool2d",
)
_SAFE: list[Any] = [
    argparse.Namespace,
    (set, "builtins.set"),
    (set, "__builtin__.set"),
    *((_Inert, name) for name in _NETWORK_CLASSES),
]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a published file by name, and the name of the model that it states, if any.

    Reads safetensors, and PyTorch's zip and legacy containers with a state dict, a dict that holds one as `model` or
    `state_dict`, or a pickled module of DALL-E. Raises DataError for anything else; nothing in it is run.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; give a published file of weights.")
    refuse_compressed(path, "a published file of weights")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(path)
        model = getattr(content.get("args"), "model", None) if isinstance(content, dict) else None
        if isinstance(content, dict):
            content = content.get("model", content.get("state_dict", content))
        tensors = dict(_walk(content)) if isinstance(content, _Inert) else dict(content)
        if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise DataError(f"{path} holds no weights by name; give a published file of VQ-KD or of DALL-E's encoder.")
        refuse_expanded(tensors)
    except DataError:
        raise
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} holds something other than tensors, containers and the classes of a published tokenizer; "
            "it was not loaded, and nothing in it was run."
        ) from None
    except Exception as error:  # other bytes make the unpickler fail in any way
        raise DataError(f"{path} is not a published file of weights ({type(error).__name__}).") from None
    floats = {str(name): tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    return floats, model if isinstance(model, str) else None


def _unpickled(path: Path) -> Any:
    """The content of a pickle; a module in the legacy container as its tensors by name."""
    try:
        return _weights_only(path)
    except pickle.UnpicklingError:
        module, tensors = read_legacy(path, frozenset(_NETWORK_CLASSES), _Inert)
        return {name: tensors[placeholder] for name, placeholder in _walk(module)}


def _weights_only(path: Path) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE):
        warnings.simplefilter("ignore")  # of a legacy container: the source of its classes is not installed
        return torch.load(path, map_location="cpu", weights_only=True)


def _walk(module: Any, prefix: str = "", depth: int = 0) -> list[tuple[str, Any]]:
    """The parameters of a pickled module and of the modules in it, by their names in a state dict."""
    if depth > _DEEPEST or not isinstance(module, _Inert):
        raise ValueError("not a network")
    own = vars(module)
    found = [(prefix + name, value) for name, value in own.get("_parameters", {}).items() if value is not None]
    for name, child in own.get("_modules", {}).items():
        found += _walk(child, f"{prefix}{name}.", depth + 1)
    return found
