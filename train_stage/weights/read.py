"""Reads weights from a run, a checkpoint, an import, an export or a published file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ...shared.errors import DataError
from ...shared.storage.files import read_sealed_json, sha256_file
from ..model.shape import Shape
from .checkpoint import EMA, newest_checkpoint, read_state
from .published import damage_explained, read_published
from .weights import Input, Weights, published_names
from .write import FORMAT, TENSORS, VERSION


def load_weights(path: str | Path) -> Weights:
    """Reads weights; no code in the file is executed.

    A run gives its newest checkpoint. A run that keeps a moving average of its weights gives the average.

    Args:
        path: A run, a checkpoint folder, a folder that `import_weights` or `export` wrote, or a published `.pth.tar`.

    Returns:
        The weights, float32 on the CPU.

    Raises:
        DataError if `path` is none of these, was changed, or its tensors are not those of its shape.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a run, a checkpoint, an import or export, or a .pth.tar.")
    if path.is_file():
        return read_published(path)
    folder = newest_checkpoint(path) or path
    descriptions = [name for name in _READERS if (folder / name).is_file() and (folder / TENSORS).is_file()]
    if not descriptions:
        raise DataError(
            f"{path} is neither a run with a checkpoint, nor a checkpoint, nor an import or export, nor a published "
            ".pth.tar."
        )
    return _READERS[descriptions[0]](folder)


def _read_tensors(folder: Path, name: str = TENSORS) -> dict[str, Tensor]:
    with damage_explained(folder / name, "damaged"):
        return {key: tensor.float() for key, tensor in load_file(folder / name).items()}


def _read_checkpoint(folder: Path) -> Weights:
    state = read_state(folder)
    with damage_explained(folder, "damaged"):
        name = EMA if EMA in state["files"] else TENSORS
        shape, model_input = Shape(**state["model"]), Input.from_json(state["input"])
        if sha256_file(folder / name) != state["files"][name]["sha256"]:
            raise ValueError(f"the digest of {name} does not match")
        names = _class_names(state.get("class_names"))
        return Weights(folder / name, shape, _read_tensors(folder, name), model_input, state["seed"], names)


def _read_imported(folder: Path) -> Weights:
    metadata = read_sealed_json(folder / "weights.json", format=FORMAT, version=VERSION)
    if sha256_file(folder / TENSORS) != metadata["sha256"]:
        raise DataError(f"{folder / TENSORS} was changed since it was written (its digest does not match).")
    shape, model_input = Shape(**metadata["shape"]), Input.from_json(metadata["input"])
    names = _class_names(metadata.get("class_names"))
    return Weights(folder / TENSORS, shape, _read_tensors(folder), model_input, metadata["seed"], names)


def _read_exported(folder: Path) -> Weights:
    tensors, config = published_names(_read_tensors(folder)), folder / "config.json"
    with damage_explained(config, "not a description of a ViT that mapet exported"):
        metadata = json.loads(config.read_text())
        arguments = metadata["model_args"]
        shape = Shape(
            dim=arguments["embed_dim"],
            depth=arguments["depth"],
            heads=arguments["num_heads"],
            patch_size=arguments["patch_size"],
            image_size=arguments["img_size"],
            k=0,
            mlp_ratio=arguments["mlp_ratio"],
        )
        names, config_input = _class_names(metadata.get("label_names")), metadata["pretrained_cfg"]
        model_input = Input.from_json({**config_input, "crop_pct": config_input.get("crop_pct") if names else None})
        return Weights(folder / TENSORS, shape, tensors, model_input, class_names=names)


def _class_names(names: Any) -> tuple[str, ...] | None:
    """Class names as JSON has them: a list, or an object from output to name; None without any."""
    if isinstance(names, dict):
        names = [names[str(output)] for output in range(len(names))]
    return tuple(map(str, names)) if names else None


# The description beside the tensors tells what wrote the folder.
_READERS: dict[str, Callable[[Path], Weights]] = {
    "state.json": _read_checkpoint,
    "weights.json": _read_imported,
    "config.json": _read_exported,
}
