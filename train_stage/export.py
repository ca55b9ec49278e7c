"""export: writes weights as a folder that timm opens, and pushes it to the Hugging Face Hub if asked for."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import Struct

from ..shared.artifacts.fields import Count, Text, read_json
from ..shared.errors import DataError, UsageError
from ..shared.runtime.console import say, table
from ..shared.runtime.devices import refuse_many_processes
from ..shared.storage.files import refuse_existing, sha256_file
from ..shared.storage.lock import writes_to_out
from ..shared.tokens.codebook import read_description
from .runs.jsonl import read_lines
from .weights.hub import push_folder, refuse_unready_hub, write_card
from .weights.onnx import ONNX, require_onnx, write_onnx
from .weights.read import load_weights
from .weights.weights import Weights
from .weights.write import TENSORS, describe_weights, weights_folder


@writes_to_out
def export(
    weights: str | Path,
    out: str | Path,
    *,
    image_size: int | None = None,
    onnx: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
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
        push_to_hub: Repository on the Hugging Face Hub, such as NAME/vit, that also gets the folder, with a model card;
            it is made if it is missing. Needs a token with write access (HF_TOKEN, or `hf auth login`).
        private: The repository is a private one.

    Returns:
        The folder.

    Raises:
        DataError if the weights cannot be read, if ONNX Runtime does not agree with PyTorch, or if the hub cannot be
        reached or refuses the upload (`out` stays); UsageError if `out` is taken, `image_size` does not fit the
        patches, `onnx` lacks its packages, or there is no token, or `private` and the repository is public.
    """
    refuse_many_processes()
    refuse_existing(folder := Path(out))
    if onnx:
        require_onnx()
    if push_to_hub is not None:
        refuse_unready_hub(push_to_hub)
    elif private:
        raise UsageError("--private is about the repository of --push-to-hub REPO; give that too, or leave it out.")
    loaded = load_weights(weights).resized(image_size)
    with weights_folder(folder, loaded.timm_tensors()) as partial:
        config = loaded.timm_config(sha256_file(partial / TENSORS))
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        difference = write_onnx(loaded, partial / ONNX) if onnx else None
        if push_to_hub is not None:
            write_card(partial, loaded, push_to_hub, _of_the_run(loaded.file))
    show_export(loaded, folder, difference)
    if push_to_hub is not None:
        say(f"Pushed to {push_folder(folder, push_to_hub, private)}.")
    return folder


class _Record(Struct):
    """run.json, as far as a model card states it."""

    images: Count
    task: Text = "pretraining"
    tokens: Text | None = None
    codebook_fingerprint: Text | None = None


def _of_the_run(file: Path) -> list[tuple[str, str]]:
    """(name, value) of how the weights in a checkpoint's file were trained; [] for other weights."""
    checkpoint, out = file.parent, file.parents[2] if len(file.parents) > 2 else file.parent
    if checkpoint.parent.name != "checkpoints" or not (out / "run.json").is_file():
        return []
    record = read_json(out / "run.json", _Record, "the record of a run")
    step = int(checkpoint.name.removeprefix("step-"))
    rows = [("training", f"{record.task} on {record.images:,} images, {step:,} steps"), *_codebook(record)]
    for name, words in (("metrics.jsonl", _METRICS), ("probe.jsonl", _EVALUATIONS)):
        for line in [line for line in read_lines(out / name) if line["step"] <= step][-1:]:
            shown = (f"{title} {line[key]:{form}}" for key, (title, form) in words.items() if line.get(key) is not None)
            rows.append((f"{name.partition('.')[0]}, step {line['step']:,}", ", ".join(shown)))
    return rows


_METRICS = {
    "epoch": ("epoch", "g"),
    "loss": ("training loss", ".4f"),
    "accuracy": ("training accuracy", ".2%"),
    "cosine": ("training cosine similarity", ".4f"),
}
_EVALUATIONS = {"top1": ("top-1", ".2%"), "top5": ("top-5", ".2%"), "knn": ("k-NN", ".2%"), "linear": ("linear", ".2%")}


def _codebook(record: _Record) -> list[tuple[str, str]]:
    """The codebook's fingerprint, and its tower and K if the token store that the run names is still there."""
    if record.codebook_fingerprint is None or record.tokens is None:
        return []
    rows, path = [("codebook", record.codebook_fingerprint)], Path(record.tokens) / "codebook.json"
    description: dict[str, Any] = {}
    with suppress(DataError):
        description = read_description(path) if path.is_file() else {}
    if description.get("fingerprint") == record.codebook_fingerprint:
        tower = str(description.get("tower", "none"))
        # A local folder's place says nothing to others.
        name = f"local-dir:{Path(tower).name}" if tower.startswith("local-dir:") else tower
        rows.append(("tokenizer", f"tower {name}, layer {description.get('layer')}, K = {description['k']}"))
    return rows


def show_export(weights: Weights, out: Path, onnx_difference: float | None) -> None:
    """Prints what was exported, how to open it, and how far ONNX Runtime is from PyTorch, if that was measured."""
    opening = f'timm.create_model("local-dir:{out}", pretrained=True)'
    rows = [*describe_weights(weights, out), ("open with", opening)]
    if onnx_difference is not None:
        rows.append(("ONNX", f"{out / ONNX}, within {onnx_difference:.1e} of PyTorch (relative to the largest output)"))
    table("Exported weights", rows)
