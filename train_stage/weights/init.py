"""Starts a new run from existing weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import nn

from ...shared.errors import UsageError
from ...shared.runtime.console import say
from ..model.shape import Shape
from .read import load_weights
from .weights import Weights

_MOST_NAMED = 8


def start_from(
    model: nn.Module, path: str | Path, leave_out: Sequence[str] = (), target: str = "tokens"
) -> dict[str, str]:
    """Copies weights into a fresh model, in place: every tensor that both have in the same size.

    Positions are resampled to the model's grid. A line on stderr names the tensors that keep their initial values.

    Args:
        model: the model of the new run, with a `shape`, on any device.
        path: whatever `load_weights` takes.
        leave_out: names of tensors that are not copied.
        target: what the model's decoder predicts; a decoder of another target is not copied either.

    Returns:
        The "file" that the weights were read from and its "sha256".

    Raises:
        DataError as `load_weights` does; UsageError if the encoders differ in anything but the image size.
    """
    weights = load_weights(path)
    shape = cast(Shape, model.shape)
    _refuse_other_shape(weights, shape, path)
    tensors = weights.resized(shape.image_size).tensors
    if weights.target != target:
        leave_out = (*leave_out, "decoder.weight", "decoder.bias")
    initial = model.state_dict()
    shared = {
        name: tensor
        for name, tensor in tensors.items()
        if name in initial and initial[name].shape == tensor.shape and name not in leave_out
    }
    model.load_state_dict(shared, strict=False)
    fresh = ", ".join(_by_module([name for name in initial if name not in shared]))
    say(f"Starting from {weights.file}{f'; not in it, so newly initialised: {fresh}' if fresh else ''}.")
    return {"file": str(weights.file), "sha256": weights.sha256()}


def _by_module(names: Sequence[str]) -> list[str]:
    """The names, of more than `_MOST_NAMED` only the modules that they are of."""
    return list(names) if len(names) <= _MOST_NAMED else list(dict.fromkeys(name.split(".")[0] for name in names))


def _refuse_other_shape(weights: Weights, shape: Shape, path: str | Path) -> None:
    for name in ("dim", "depth", "heads", "patch_size", "mlp_ratio"):
        stored, wanted = getattr(weights.shape, name), getattr(shape, name)
        if stored != wanted:
            raise UsageError(f"--init {path} has {name} {stored} and the run's model {wanted}; set the model to fit.")
