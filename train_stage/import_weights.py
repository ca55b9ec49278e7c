"""import: writes weights from elsewhere as one plain folder that every command takes."""

from pathlib import Path

from ..shared.runtime.console import table
from ..shared.runtime.devices import refuse_many_processes
from ..shared.storage.files import refuse_existing, sha256_file, write_sealed_json
from ..shared.storage.lock import writes_to_out
from .weights.read import load_weights
from .weights.weights import Weights
from .weights.write import FORMAT, TENSORS, VERSION, describe_weights, weights_folder


@writes_to_out
def import_weights(
    file: str | Path, out: str | Path, *, image_size: int | None = None, heads: int | None = None
) -> Path:
    """Writes weights as one plain folder that every WEIGHTS argument takes.

    The folder holds `model.safetensors`, with every tensor under its published name (a decoder included), and
    `weights.json`: kind, shape, input mean, std and interpolation, seed, and the source. No code in the source is
    executed.

    Args:
        file: A published .pth.tar (pre-training or fine-tuned), a run, a checkpoint, or an exported folder.
        out: Folder to write: model.safetensors and weights.json. It must not exist, or be empty.
        image_size: Pixels; resamples the position embeddings to another grid (default: as it was).
        heads: Attention heads of a published .pth.tar whose size is not vit-tiny, vit-small, vit-base or vit-large.

    Returns:
        The folder.

    Raises:
        DataError if `file` cannot be read; UsageError if `out` is taken, or `image_size` or `heads` does not fit.
    """
    refuse_many_processes()
    refuse_existing(folder := Path(out))
    loaded = load_weights(file, heads).resized(image_size)
    with weights_folder(folder, loaded.tensors) as partial:
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "kind": loaded.kind,
            "classes": loaded.classes,
            **({} if loaded.class_names is None else {"class_names": list(loaded.class_names)}),
            **({} if loaded.target == "tokens" else {"target": loaded.target}),
            "shape": loaded.shape.to_json(),
            "input": loaded.input.to_json(),
            "seed": loaded.seed,
            "sha256": sha256_file(partial / TENSORS),
            "source": {"name": loaded.file.name, "sha256": loaded.sha256()},
        }
        write_sealed_json(partial / "weights.json", metadata)
    show_import(loaded, folder)
    return folder


def show_import(weights: Weights, out: Path) -> None:
    """Prints what was imported, and how to use it."""
    table("Imported weights", [*describe_weights(weights, out), ("use as", f"mapet train export {out} --out ...")])
