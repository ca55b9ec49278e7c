"""Folders of weights, as `export` and `import_weights` write them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ...shared.storage.files import written_whole
from .weights import Weights

FORMAT, VERSION = "mapet-weights", 1
TENSORS = "model.safetensors"


@contextmanager
def weights_folder(out: Path, tensors: dict[str, Tensor]) -> Iterator[Path]:
    """Yields a hidden folder that holds the tensors and becomes `out` when the block ends."""
    with written_whole(out) as partial:
        partial.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        yield partial


def describe_weights(weights: Weights, out: Path) -> list[tuple[str, str]]:
    """(name, value) of what was written to `out`, for a table."""
    shape, side = weights.shape, weights.grid
    head = f", K = {shape.k}" if weights.target == "tokens" else f", {shape.k} features"
    outputs = {"pretraining": head, "encoder": "", "classifier": f", {weights.classes} classes"}
    return [
        ("from", str(weights.file)),
        ("kind", f"{weights.kind}{outputs[weights.kind]}"),
        ("shape", f"dim {shape.dim}, depth {shape.depth}, {shape.heads} heads"),
        ("images", f"{shape.image_size} px, patches of {shape.patch_size} px in a {side}x{side} grid"),
        ("to", str(out)),
    ]
