"""Reads checkpoints in the format that the authors of MaPeT publish."""

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

from ...shared.artifacts.pickled import refuse_compressed, refuse_expanded
from ...shared.errors import DataError, UsageError
from ..model.mapet import MaPeT
from ..model.shape import SIZES, Shape
from .weights import Weights

_DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError),
    *(ValueError, SafetensorError),
)
"""What PyTorch and safetensors raise for content that is incomplete or impossible."""


def load_published(path: str | Path, *, heads: int | None = None) -> MaPeT:
    """Reads the pre-training model from a published checkpoint.

    Only tensors, plain containers and `argparse.Namespace` are read; no code in the file is executed.

    Args:
        path: The published `.pth.tar`.
        heads: Attention heads of a model whose size is not one of vit-tiny, vit-small, vit-base and vit-large; nothing
            in such a file tells them.

    Returns:
        The model, float32 on the CPU.

    Raises:
        DataError if the file is missing, holds anything else, or is not a pre-training checkpoint; UsageError if
        `heads` does not fit its weights.
    """
    return read_published(Path(path), heads).mapet()


@contextmanager
def damage_explained(path: Path, verdict: str) -> Iterator[None]:
    """Turns the errors of reading incomplete or impossible content into a DataError: "`path` is `verdict` (...)"."""
    try:
        yield
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise DataError(f"{path} is {verdict} ({reason}).") from None
    except UsageError as error:
        raise DataError(f"{path} is {verdict} ({error})") from None


def read_published(path: Path, heads: int | None = None) -> Weights:
    """The weights in a published checkpoint, pre-trained or fine-tuned.

    Raises:
        DataError and UsageError as `load_published` does.
    """
    checkpoint = _unpickled(path)
    with damage_explained(path, "not a published checkpoint"):
        state = checkpoint["state_dict"]
        refuse_expanded(state)
        tensors = {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}
        architecture = str(checkpoint.get("arch", ""))
    with damage_explained(path, "not a checkpoint with the weights of a MaPeT model"):
        dim, depth = _size(tensors)
    heads = _heads(path, architecture, dim, depth, heads)
    with damage_explained(path, "not a checkpoint with the weights of a MaPeT model"):
        return Weights(path, _published_shape(tensors, heads, path), tensors)


def _unpickled(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a published .pth.tar.")
    refuse_compressed(path, "a published checkpoint")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} holds something other than tensors, containers and argparse.Namespace; "
            "it was not loaded, and nothing in it was run."
        ) from None
    except Exception as error:  # other bytes make the unpickler fail in any way
        raise DataError(f"{path} is not a published checkpoint ({type(error).__name__}).") from None
    return checkpoint


def _size(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """(dim, depth) of a model."""
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    return len(tensors["patch_embed.proj.weight"]), depth


def _heads(path: Path, architecture: str, dim: int, depth: int, given: int | None) -> int:
    """The number of attention heads: nothing in the weights tells it, only the name of a published size does."""
    size = re.search("|".join(SIZES), architecture)
    published = SIZES[size[0]] if size else None
    if given is None:
        if published is None:
            raise DataError(
                f"{path} names architecture {architecture!r}; expected a name with one of {', '.join(SIZES)}. Nothing "
                "else in it tells its attention heads, so give them by --heads."
            )
        return published[2]
    if published and published[:2] == (dim, depth) and given != published[2]:
        raise UsageError(f"--heads {given} is not the {published[2]} heads of {architecture} in {path}.")
    if given < 1 or dim % given:
        raise UsageError(
            f"--heads {given} does not divide dim {dim} of {path}; give the heads that it was trained with."
        )
    return given


def _published_shape(tensors: dict[str, Tensor], heads: int, path: Path) -> Shape:
    dim, depth = _size(tensors)
    patch_size = tensors["patch_embed.proj.weight"].shape[2]
    positions = tensors["pos_embed"].shape[1] - 1
    grid = round(positions**0.5)
    if grid**2 != positions:
        raise DataError(f"{path} has positions of {positions} patches, which do not form a square grid.")
    return Shape(
        dim=dim,
        depth=depth,
        heads=heads,
        patch_size=patch_size,
        image_size=grid * patch_size,
        k=len(tensors.get("decoder.weight", ())),
        mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / dim,
    )
