"""What `export` and `import` have in common when they write a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ...shared.runtime.console import table
from ...shared.storage.files import written_whole
from .weights import Weights

FORMAT, VERSION = "mapet-weights", 1
TENSORS = "model.safetensors"


@contextmanager
def weights_folder(out: Path, tensors: dict[str, Tensor]) -> Iterator[Path]:
    """Yields the hidden folder, its tensors written, that becomes `out`."""
    with written_whole(out) as partial:
        partial.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        yield partial


def weights_summary(title: str, found: Weights, out: Path, next_step: tuple[str, str]) -> None:
    shape, side = found.shape, found.grid
    outputs = {"pretraining": f", K = {shape.k}", "encoder": "", "classifier": f", {found.classes} classes"}[found.kind]
    rows = [
        ("from", str(found.file)),
        ("kind", f"{found.kind}{outputs}"),
        ("shape", f"dim {shape.dim}, depth {shape.depth}, {shape.heads} heads"),
        ("images", f"{shape.image_size} px, patches of {shape.patch_size} px in a {side}x{side} grid"),
        ("to", str(out)),
    ]
    table(title, [*rows, next_step])
