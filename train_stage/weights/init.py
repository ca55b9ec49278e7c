"""A new run that starts from weights."""

from pathlib import Path

from ...shared.errors import UsageError
from ...shared.runtime.console import say
from ..model.mapet import MaPeT
from .read import load_weights


def start_from(model: MaPeT, path: str | Path) -> dict[str, str]:
    """Copies weights into a fresh model, in place, as far as both have them, and says what stays fresh.

    Positions are resampled to the model's grid. Returns the "file" that the weights were read from and its "sha256".
    Raises DataError as `load_weights` does, UsageError if the encoders differ in anything but the image size.
    """
    found, shape = load_weights(path), model.shape
    for name in ("dim", "depth", "heads", "patch_size", "mlp_ratio"):
        theirs, ours = getattr(found.shape, name), getattr(shape, name)
        if theirs != ours:
            raise UsageError(f"--init {path} has {name} {theirs} and the run's model {ours}; set the model to fit.")
    known = model.state_dict()
    tensors = found.resized(shape.image_size).tensors.items()
    taken = {name: tensor for name, tensor in tensors if name in known and known[name].shape == tensor.shape}
    model.load_state_dict(taken, strict=False)
    fresh = ", ".join(name for name in known if name not in taken)
    say(f"Starting from {found.file}{f'; fresh are {fresh}' if fresh else ''}.")
    return {"file": str(found.file), "sha256": found.sha256()}
