"""Checkpoints as the authors of MaPeT publish them."""

import argparse
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ...shared.errors import DataError, UsageError
from ..model.mapet import MaPeT
from ..model.shape import SIZES, Shape
from .weights import Weights


def load_published(path: str | Path) -> MaPeT:
    """The pre-training model in a published `.pth.tar`, float32 on the CPU.

    Only tensors, plain containers and `argparse.Namespace` are read; nothing in the file is run.
    Raises DataError if the file is missing, holds anything else, or is no pre-training checkpoint.
    """
    return read_published(Path(path)).mapet()


@contextmanager
def damage_explained(path: Path, as_what: str) -> Iterator[None]:
    """DataError if what `path` says is incomplete or cannot be."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise DataError(f"{path} is {as_what} ({reason}).") from None
    except UsageError as error:
        raise DataError(f"{path} is {as_what} ({error})") from None


def read_published(path: Path) -> Weights:
    checkpoint = _unpickled(path)
    with damage_explained(path, "no published checkpoint"):
        tensors = {name.removeprefix("module."): tensor.float() for name, tensor in checkpoint["state_dict"].items()}
        architecture = str(checkpoint.get("arch", ""))
    with damage_explained(path, "no checkpoint that holds the weights of a MaPeT model"):
        return Weights(path, _published_shape(tensors, architecture, path), tensors)


def _unpickled(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a published .pth.tar.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} holds something other than tensors, containers and argparse.Namespace; "
            "it was not loaded and nothing in it was run."
        ) from None
    except Exception as error:  # bytes that are no checkpoint end the unpickler in every way there is
        raise DataError(f"{path} is no published checkpoint ({type(error).__name__}).") from None


def _published_shape(tensors: dict[str, Tensor], architecture: str, path: Path) -> Shape:
    # The number of heads leaves no trace in the weights; the architecture's name is the only witness.
    named = re.search("|".join(SIZES), architecture)
    if not named:
        raise DataError(f"{path} names architecture {architecture!r}; expected one of {', '.join(SIZES)} in it.")
    dim, _, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    positions = tensors["pos_embed"].shape[1] - 1
    grid = round(positions**0.5)
    if grid**2 != positions:
        raise DataError(f"{path} has positions of {positions} patches, which are no square grid.")
    return Shape(
        dim=dim,
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        heads=SIZES[named[0]][2],
        patch_size=patch_size,
        image_size=grid * patch_size,
        k=len(tensors.get("decoder.weight", ())),
        mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / dim,
    )
