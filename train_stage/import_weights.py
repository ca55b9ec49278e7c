"""import: weights from elsewhere -> one plain folder that every command takes."""

from pathlib import Path

from ..shared.storage.files import refuse_existing, sha256_file, write_sealed_json
from .weights.read import load_weights
from .weights.write import FORMAT, TENSORS, VERSION, weights_folder, weights_summary


def import_weights(file: str | Path, out: str | Path, *, image_size: int | None = None) -> Path:
    """Writes weights as one plain folder that every WEIGHTS argument takes, and returns it.

    It holds `model.safetensors`, under the published names and with everything that was there (a decoder included),
    and `weights.json`: kind, shape, input mean, std and interpolation, seed, and where it came from.

    Args:
        file: a published `.pth.tar` (pre-training or fine-tuned), a run, a checkpoint, or a folder like `out`.
        out: the folder to write; it must not exist, or be empty.
        image_size: pixels; position embeddings are resampled to another grid (bicubic, antialiased).

    Raises:
        DataError if `file` cannot be read; UsageError if `out` is taken or `image_size` does not fit the patches.
    """
    refuse_existing(out := Path(out))
    found = load_weights(file).resized(image_size)
    with weights_folder(out, found.tensors) as partial:
        about = {
            "format": FORMAT,
            "version": VERSION,
            "kind": found.kind,
            "classes": found.classes,
            "shape": found.shape.to_json(),
            "input": found.input.to_json(),
            "seed": found.seed,
            "sha256": sha256_file(partial / TENSORS),
            "source": {"name": found.file.name, "sha256": found.sha256()},
        }
        write_sealed_json(partial / "weights.json", about)
    weights_summary("Imported weights", found, out, ("use as", f"mapet train export {out} --out ..."))
    return out
