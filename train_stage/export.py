"""export: writes weights as a folder that timm opens."""

import json
from pathlib import Path

from ..shared.runtime.console import table
from ..shared.storage.files import refuse_existing, sha256_file
from .weights.read import load_weights
from .weights.weights import Weights
from .weights.write import TENSORS, describe_weights, weights_folder


def export(weights: str | Path, out: str | Path, *, image_size: int | None = None) -> Path:
    """Writes a folder that `timm.create_model("local-dir:OUT", pretrained=True)` opens.

    The folder holds `model.safetensors` and `config.json`, which has the digest of the former: the encoder, and the
    head of a fine-tuned model. Decoder and mask embedding are left out (`import_weights` keeps them). In timm,
    `forward_features` gives the final norm's output of all rows, and the pooled output equals `MaPeT.features`; a
    fine-tuned model gives its logits.

    Args:
        weights: A run, a checkpoint, an imported or exported folder, or a published .pth.tar.
        out: Folder to write: model.safetensors and config.json. It must not exist, or be empty.
        image_size: Pixels; resamples the position embeddings to another grid (default: as it was).

    Returns:
        The folder.

    Raises:
        DataError if the weights cannot be read; UsageError if `out` is taken or `image_size` does not fit the patches.
    """
    refuse_existing(folder := Path(out))
    loaded = load_weights(weights).resized(image_size)
    with weights_folder(folder, loaded.timm_tensors()) as partial:
        (partial / "config.json").write_text(
            json.dumps(loaded.timm_config(sha256_file(partial / TENSORS)), indent=1) + "\n"
        )
    show_export(loaded, folder)
    return folder


def show_export(weights: Weights, out: Path) -> None:
    """Prints what was exported, and how to open it."""
    opening = f'timm.create_model("local-dir:{out}", pretrained=True)'
    table("Exported weights", [*describe_weights(weights, out), ("open with", opening)])
