"""Weights that travel: published checkpoints, runs and timm folders in; one plain folder of our own, or timm's, out."""

import argparse
import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..shared.errors import DataError, UsageError
from ..shared.runtime.console import say, table
from ..shared.storage.files import read_sealed_json, refuse_existing, sha256_file, write_sealed_json, written_whole
from .checkpoint import EMA, newest_checkpoint, read_state
from .model.mapet import MaPeT
from .model.shape import SIZES, Shape
from .weights import Input, Weights, published_names

FORMAT, VERSION = "mapet-weights", 1
_TENSORS = "model.safetensors"


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
    with _folder(out, found.timm_tensors()) as partial:
        (partial / "config.json").write_text(json.dumps(found.timm_config(), indent=1) + "\n")
    _summary("Exported weights", found, out, ("open with", f'timm.create_model("local-dir:{out}", pretrained=True)'))
    return out


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
    with _folder(out, found.tensors) as partial:
        about = {
            "format": FORMAT,
            "version": VERSION,
            "kind": found.kind,
            "classes": found.classes,
            "shape": found.shape.to_json(),
            "input": found.input.to_json(),
            "seed": found.seed,
            "sha256": sha256_file(partial / _TENSORS),
            "source": {"name": found.file.name, "sha256": found.sha256()},
        }
        write_sealed_json(partial / "weights.json", about)
    _summary("Imported weights", found, out, ("use as", f"mapet train export {out} --out ..."))
    return out


@contextmanager
def _folder(out: Path, tensors: dict[str, Tensor]) -> Iterator[Path]:
    """Yields the hidden folder, its tensors written, that becomes `out`."""
    with written_whole(out) as partial:
        partial.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / _TENSORS)
        yield partial


def _summary(title: str, found: Weights, out: Path, next_step: tuple[str, str]) -> None:
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


def load_published(path: str | Path) -> MaPeT:
    """The pre-training model in a published `.pth.tar`, float32 on the CPU.

    Only tensors, plain containers and `argparse.Namespace` are read; nothing in the file is run.
    Raises DataError if the file is missing, holds anything else, or is no pre-training checkpoint.
    """
    return _read_published(Path(path)).mapet()


def load_weights(path: str | Path) -> Weights:
    """Weights from a run, a checkpoint folder, what `import_weights` or `export` wrote, or a published `.pth.tar`.

    Of a run that keeps a moving average of its weights it is the average. Nothing in them is run. Raises DataError if
    `path` is none of these, was changed, or its tensors are not those of its shape.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a run, a checkpoint, an import or export, or a .pth.tar.")
    if path.is_file():
        return _read_published(path).check()
    folder = newest_checkpoint(path) or path
    described = [name for name in _READERS if (folder / name).is_file() and (folder / _TENSORS).is_file()]
    if not described:
        raise DataError(
            f"{path} is neither a run with a checkpoint, nor a checkpoint, nor an import or export, nor a published "
            ".pth.tar."
        )
    return _READERS[described[0]](folder).check()


def start_from(model: MaPeT, path: str | Path) -> dict[str, str]:
    """Copies weights into a fresh model, in place, as far as both have them, and says what stays fresh.

    Positions are resampled to the model's grid. Returns the "file" that the weights were read from and its "sha256".
    Raises DataError as `load_weights` does, UsageError if the encoders differ in anything but the image size.
    """
    found, shape = load_weights(path), model.shape
    for name in ("dim", "depth", "heads", "patch_size", "mlp_ratio"):
        theirs, ours = getattr(found.shape, name), getattr(shape, name)
        if theirs != ours:
            raise UsageError(f"--init {path} has {name} {theirs} and the run's model {ours}; set the model to fit.")
    known = model.state_dict()
    tensors = found.resized(shape.image_size).tensors.items()
    taken = {name: tensor for name, tensor in tensors if name in known and known[name].shape == tensor.shape}
    model.load_state_dict(taken, strict=False)
    fresh = ", ".join(name for name in known if name not in taken)
    say(f"Starting from {found.file}{f'; fresh are {fresh}' if fresh else ''}.")
    return {"file": str(found.file), "sha256": found.sha256()}


@contextmanager
def _described(path: Path, as_what: str) -> Iterator[None]:
    """DataError if what `path` says is incomplete or cannot be."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise DataError(f"{path} is {as_what} ({reason}).") from None
    except UsageError as error:
        raise DataError(f"{path} is {as_what} ({error})") from None


def _read_tensors(folder: Path, name: str = _TENSORS) -> dict[str, Tensor]:
    with _described(folder / name, "damaged"):
        return {key: tensor.float() for key, tensor in load_file(folder / name).items()}


def _read_checkpoint(folder: Path) -> Weights:
    about = read_state(folder)
    with _described(folder, "damaged"):
        name = EMA if EMA in about["files"] else _TENSORS
        shape, seen = Shape(**about["model"]), Input.from_json(about["input"])
        if sha256_file(folder / name) != about["files"][name]["sha256"]:
            raise ValueError(f"the digest of {name} does not match")
        return Weights(folder / name, shape, _read_tensors(folder, name), seen, about["seed"])


def _read_imported(folder: Path) -> Weights:
    about = read_sealed_json(folder / "weights.json", format=FORMAT, version=VERSION)
    if sha256_file(folder / _TENSORS) != about["sha256"]:
        raise DataError(f"{folder / _TENSORS} was changed since it was written (its digest does not match).")
    shape, seen = Shape(**about["shape"]), Input.from_json(about["input"])
    return Weights(folder / _TENSORS, shape, _read_tensors(folder), seen, about["seed"])


def _read_exported(folder: Path) -> Weights:
    tensors, config = published_names(_read_tensors(folder)), folder / "config.json"
    with _described(config, "no description of a ViT that mapet exported"):
        about = json.loads(config.read_text())
        arguments = about["model_args"]
        shape = Shape(
            dim=arguments["embed_dim"],
            depth=arguments["depth"],
            heads=arguments["num_heads"],
            patch_size=arguments["patch_size"],
            image_size=arguments["img_size"],
            k=0,
            mlp_ratio=arguments["mlp_ratio"],
        )
        return Weights(folder / _TENSORS, shape, tensors, Input.from_json(about["pretrained_cfg"]))


# Which description lies beside the tensors says who wrote the folder.
_READERS: dict[str, Callable[[Path], Weights]] = {
    "state.json": _read_checkpoint,
    "weights.json": _read_imported,
    "config.json": _read_exported,
}


def _read_published(path: Path) -> Weights:
    checkpoint = _unpickled(path)
    with _described(path, "no published checkpoint"):
        tensors = {name.removeprefix("module."): tensor.float() for name, tensor in checkpoint["state_dict"].items()}
        architecture = str(checkpoint.get("arch", ""))
    with _described(path, "no checkpoint that holds the weights of a MaPeT model"):
        return Weights(path, _published_shape(tensors, architecture, path), tensors)


def _unpickled(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a published .pth.tar.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(
            f"{path} holds something other than tensors, containers and argparse.Namespace; "
            "it was not loaded and nothing in it was run."
        ) from None
    except Exception as error:  # bytes that are no checkpoint end the unpickler in every way there is
        raise DataError(f"{path} is no published checkpoint ({type(error).__name__}).") from None


def _published_shape(tensors: dict[str, Tensor], architecture: str, path: Path) -> Shape:
    # The number of heads leaves no trace in the weights; the architecture's name is the only witness.
    named = re.search("|".join(SIZES), architecture)
    if not named:
        raise DataError(f"{path} names architecture {architecture!r}; expected one of {', '.join(SIZES)} in it.")
    dim, _, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    positions = tensors["pos_embed"].shape[1] - 1
    grid = round(positions**0.5)
    if grid**2 != positions:
        raise DataError(f"{path} has positions of {positions} patches, which are no square grid.")
    return Shape(
        dim=dim,
        depth=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
        heads=SIZES[named[0]][2],
        patch_size=patch_size,
        image_size=grid * patch_size,
        k=len(tensors.get("decoder.weight", ())),
        mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / dim,
    )
