"""Reads weights from a run, a checkpoint, an import, an export or a published file."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import UNSET, UnsetType
from safetensors.torch import load_file
from torch import Tensor

from ...shared.artifacts.fields import checked, read_json
from ...shared.artifacts.tensors import read_shapes
from ...shared.errors import DataError, UsageError
from ...shared.runtime.console import say
from ...shared.storage.bounded import refuse_irregular
from ...shared.storage.files import read_sealed_json, sha256_file
from .checkpoint import EMA, newest_checkpoint, read_state
from .published import damage_explained, read_published
from .schema import CheckpointState, ExportConfig, ImportedWeights
from .weights import Input, Weights, published_names
from .write import FORMAT, TENSORS, VERSION

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

_RESTORE = "restore it or make it again"
_SHIPPED = Path(__file__).parent / "shipped"


def load_weights(path: str | Path, heads: int | None = None) -> Weights:
    """Reads weights; no code in the file is executed.

    A run gives its newest checkpoint. A run that keeps a moving average of its weights gives the average.

    Args:
        path: A run, a checkpoint folder, a folder that `import_weights` or `export` wrote, a published `.pth.tar`, or
            the name of weights in the package, such as mapet-drawings-tiny.
        heads: Attention heads of a published `.pth.tar` of an unpublished size, as `load_published` takes them.

    Returns:
        The weights, float32 on the CPU.

    Raises:
        DataError if `path` is none of these, was changed, or its tensors are not those of its shape; UsageError if
        `heads` does not fit.
    """
    path = _located(Path(path))
    if not path.exists():
        raise DataError(
            f"{path} does not exist; give a run, a checkpoint, an import or export, a .pth.tar, or the name of weights "
            f"in the package ({', '.join(sorted(folder.name for folder in _SHIPPED.iterdir()))})."
        )
    if path.is_file():
        return read_published(path, heads)
    if heads is not None:
        raise UsageError(f"--heads is for published .pth.tar files; {path} is a folder that states its heads itself.")
    folder = newest_checkpoint(path) or path
    descriptions = [name for name in _READERS if (folder / name).is_file() and (folder / TENSORS).is_file()]
    if not descriptions:
        raise DataError(
            f"{path} is neither a run with a checkpoint, nor a checkpoint, nor an import or export, nor a published "
            ".pth.tar."
        )
    return _READERS[descriptions[0]](folder)


def load(weights: str | Path) -> "VisionTransformer":
    """The encoder of any weights as timm's VisionTransformer, in eval mode, float32 on the CPU.

    `forward_features` maps normalised pixels (B, 3, S, S) to the rows of the final norm (B, 1 + patches, dim), and the
    model itself to pooled features, or to the logits of a fine-tuned model.

    Args:
        weights: Whatever `load_weights` takes, such as "mapet-drawings-tiny", which is in the package.

    Raises:
        DataError as `load_weights` does.
    """
    return load_weights(weights).vit()


def _located(path: Path) -> Path:
    """The folder of weights in the package, if `path` is a name of them and nothing in the working directory."""
    shipped = _SHIPPED / path
    return shipped if path.name == str(path) and shipped.is_dir() and not path.exists() else path


def _read_tensors(path: Path, digest: str | UnsetType) -> dict[str, Tensor]:
    """The tensors of a file of weights, float32, whose SHA-256 must be `digest`."""
    refuse_irregular(path)
    if digest is UNSET:
        say(f"{path} carries no digest: it was written before exports had one, so damage would not be noticed.")
    elif sha256_file(path) != digest:
        raise DataError(f"{path} was changed since it was written (its digest does not match); {_RESTORE}.")
    read_shapes(path, _RESTORE)  # before anything is loaded
    with damage_explained(path, "damaged"):
        return {key: tensor.float() for key, tensor in load_file(path).items()}


def _read_checkpoint(folder: Path) -> Weights:
    content = read_state(folder)
    state = checked(content, CheckpointState, folder / "state.json", "use another checkpoint")
    if state.task == "segmentation":
        raise DataError(
            f"{folder} is of a segmentation, whose encoder was trained without a final norm; give the weights that the "
            "run started from, or measure it with train segment --head upernet."
        )
    if state.model is UNSET or state.input is UNSET or state.seed is UNSET:
        raise DataError(f"{folder / 'state.json'} lacks the model, its input or its seed; use another checkpoint.")
    name = EMA if EMA in state.files else TENSORS
    digests = {str(file): stored.sha256 for file, stored in state.files.items()}
    tensors = _read_tensors(folder / name, digests[name])
    model_input = Input.from_json(content["input"])
    shape, names = state.model.to_shape(), _names(state.class_names)
    return Weights(folder / name, shape, tensors, model_input, state.seed, names, state.target)


def _read_imported(folder: Path) -> Weights:
    content = read_sealed_json(folder / "weights.json", format=FORMAT, version=VERSION)
    metadata = checked(content, ImportedWeights, folder / "weights.json", "import the weights again")
    tensors = _read_tensors(folder / TENSORS, metadata.sha256)
    model_input, names = Input.from_json(content["input"]), _names(metadata.class_names)
    shape = metadata.shape.to_shape()
    return Weights(folder / TENSORS, shape, tensors, model_input, metadata.seed, names, metadata.target)


def _read_exported(folder: Path) -> Weights:
    config = read_json(folder / "config.json", ExportConfig, "a description of a ViT that mapet exported")
    tensors = _read_tensors(folder / TENSORS, config.model_sha256)
    with damage_explained(folder / "config.json", "not a description of a ViT that mapet exported"):
        shape = config.model_args.to_shape()
        size = config.pretrained_cfg
        names = _names(config.label_names)
        fields = {"mean": size.mean, "std": size.std, "interpolation": size.interpolation}
        # Exports of encoders state timm's default, which no classifier was evaluated with.
        crop = {"crop_pct": size.crop_pct} if names and size.crop_pct is not UNSET else {}
        model_input = Input.from_json({**fields, **crop})
        return Weights(folder / TENSORS, shape, published_names(tensors), model_input, class_names=names)


def _names(names: list[str] | UnsetType) -> tuple[str, ...] | None:
    return None if names is UNSET else tuple(names)


# The description beside the tensors tells what wrote the folder.
_READERS: dict[str, Callable[[Path], Weights]] = {
    "state.json": _read_checkpoint,
    "weights.json": _read_imported,
    "config.json": _read_exported,
}
