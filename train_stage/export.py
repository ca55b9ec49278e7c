"""export: weights -> a folder that timm opens."""

import json
from pathlib import Path

from ..shared.storage.files import refuse_existing
from .weights.read import load_weights
from .weights.write import weights_folder, weights_summary


def export(weights: str | Path, out: str | Path, *, image_size: int | None = None) -> Path:
    """Writes a folder that `timm.create_model("local-dir:OUT", pretrained=True)` opens, and returns it.

    It holds `model.safetensors` and `config.json`: the encoder, and the head of a fine-tuned model. Decoder and mask
    embedding stay behind (`import_weights` keeps them). timm's `forward_features` are the final norm's output in all
    rows and its pooled output is `MaPeT.features`; a fine-tuned model gives its logits.

    Args:
        weights: a run, a checkpoint folder, an imported or exported folder, or a published `.pth.tar`.
        out: the folder to write; it must not exist, or be empty.
        image_size: pixels; position embeddings are resampled to another grid (bicubic, antialiased).

    Raises:
        DataError if `weights` cannot be read; UsageError if `out` is taken or `image_size` does not fit the patches.
    """
    refuse_existing(out := Path(out))
    found = load_weights(weights).resized(image_size)
    with weights_folder(out, found.timm_tensors()) as partial:
        (partial / "config.json").write_text(json.dumps(found.timm_config(), indent=1) + "\n")
    weights_summary(
        "Exported weights", found, out, ("open with", f'timm.create_model("local-dir:{out}", pretrained=True)')
    )
    return out
