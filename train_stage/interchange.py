"""Weights from elsewhere: the published checkpoints, runs and checkpoints of our own."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..shared.errors import DataError
from .checkpoint import newest_checkpoint, read_state
from .model import SIZES, MaPeT, Shape


def load_published(path: str | Path) -> MaPeT:
    """The pre-training model in a published `.pth.tar`, float32 on the CPU.

    Only tensors, plain containers and `argparse.Namespace` are read; nothing in the file is run.
    Raises DataError if the file is missing, holds anything else, or is no pre-training checkpoint.
    """
    weights, checkpoint = _read_published(Path(path))
    if "decoder.weight" not in weights:
        raise DataError(f"{path} is no pre-training checkpoint: it has no decoder.weight.")
    try:
        model = MaPeT(_published_shape(weights, str(checkpoint.get("arch", "")), Path(path)))
        model.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        raise DataError(f"{path} does not hold the weights of a MaPeT model ({str(error).splitlines()[0]}).") from None
    return model


def _read_published(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a published .pth.tar.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} holds pickled objects other than tensors, containers and argparse.Namespace; "
            "it was not loaded and nothing in it was run."
        ) from None
    except (OSError, EOFError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no published checkpoint ({type(error).__name__}: {error}).") from None
    return {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}, checkpoint


def _published_shape(weights: dict[str, Tensor], architecture: str, path: Path) -> Shape:
    # The number of heads leaves no trace in the weights; the architecture's name is the only witness.
    named = re.search("|".join(SIZES), architecture)
    if not named:
        raise DataError(f"{path} names architecture {architecture!r}; expected one of {', '.join(SIZES)} in it.")
    dim, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    grid = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return Shape(
        dim=dim,
        depth=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        heads=SIZES[named[0]][2],
        patch_size=patch_size,
        image_size=grid * patch_size,
        k=len(weights["decoder.weight"]),
        mlp_ratio=len(weights["blocks.0.mlp.fc1.weight"]) / dim,
    )


def load_weights(path: str | Path) -> tuple[MaPeT, dict[str, Any]]:
    """A model and what is known of it ("mean", "std", "interpolation", "seed"), from a run, a checkpoint folder or a
    published `.pth.tar`. Raises DataError if `path` is none of them.
    """
    path = Path(path)
    if path.is_file():
        return load_published(path), {}
    folder = newest_checkpoint(path) or path
    if not (folder / "model.safetensors").is_file():
        raise DataError(f"{path} is neither a run with a checkpoint, nor a checkpoint, nor a published .pth.tar.")
    about = read_state(folder)
    try:
        model = MaPeT(Shape(**about["model"]))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder} is damaged ({type(error).__name__}: {str(error).splitlines()[0]}).") from None
    return model, {**about["input"], "seed": about["seed"]}
