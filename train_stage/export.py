"""export: writes weights as a folder that timm opens."""

import json
from pathlib import Path

from ..shared.runtime.console import table
from ..shared.runtime.devices import refuse_many_processes
from ..shared.storage.files import refuse_existing, sha256_file
from ..shared.storage.lock import writes_to_out
from .weights.onnx import ONNX, require_onnx, write_onnx
from .weights.read import load_weights
from .weights.weights import Weights
from .weights.write import TENSORS, describe_weights, weights_folder


@writes_to_out
def export(weights: str | Path, out: str | Path, *, image_size: int | None = None, onnx: bool = False) -> Path:
    """Writes a folder that `timm.create_model("local-dir:OUT", pretrained=True)` opens.

    The folder holds `model.safetensors` and `config.json`, which has the former's SHA-256: the encoder, and the head of
    a fine-tuned model. Decoder and mask embedding are left out (`import_weights` keeps them). In timm,
    `forward_features` gives the final norm's output of all rows, and the pooled output equals `MaPeT.features`; a
    fine-tuned model gives its logits.

    Args:
        weights: A run, a checkpoint, an imported or exported folder, or a published .pth.tar.
        out: Folder to write: model.safetensors and config.json. It must not exist, or be empty.
        image_size: Pixels; resamples the position embeddings to another grid (default: as it was).
        onnx: Also writes model.onnx, checked against PyTorch with ONNX Runtime (needs the `onnx` extra). Its input
            `pixels` is (B, 3, S, S), normalised; its output the logits, or the pooled features of a model without head.

    Returns:
        The folder.

    Raises:
        DataError if the weights cannot be read, or if ONNX Runtime does not agree with PyTorch; UsageError if `out` is
        taken, `image_size` does not fit the patches, or `onnx` lacks its packages.
    """
    refuse_many_processes()
    refuse_existing(folder := Path(out))
    if onnx:
        require_onnx()
    loaded = load_weights(weights).resized(image_size)
    with weights_folder(folder, loaded.timm_tensors()) as partial:
        config = loaded.timm_config(sha256_file(partial / TENSORS))
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        difference = write_onnx(loaded, partial / ONNX) if onnx else None
    show_export(loaded, folder, difference)
    return folder


def show_export(weights: Weights, out: Path, onnx_difference: float | None) -> None:
    """Prints what was exported, how to open it, and how far ONNX Runtime is from PyTorch, if that was measured."""
    opening = f'timm.create_model("local-dir:{out}", pretrained=True)'
    rows = [*describe_weights(weights, out), ("open with", opening)]
    if onnx_difference is not None:
        rows.append(("ONNX", f"{out / ONNX}, within {onnx_difference:.1e} of PyTorch (relative to the largest output)"))
    table("Exported weights", rows)
