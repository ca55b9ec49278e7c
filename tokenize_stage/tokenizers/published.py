"""Published tokenizers, VQ-KD and DALL-E's dVAE: from their file, or from the folder that an import wrote."""

import hashlib
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from upath import UPath

from ...shared.errors import DataError
from ...shared.storage.files import sha256_file
from ...shared.storage.remote import read_whole
from ...shared.tokens.codebook import INNER_PRODUCT, Codebook
from ..towers.tower import Tower, TowerSettings
from . import dvae, vqkd
from .pickles import read_tensors

ENCODER = "encoder.safetensors"
"""The file in an imported folder that holds the encoder's weights."""
_OPENED = {vqkd.NAME: vqkd.opened_vqkd, dvae.NAME: dvae.opened_dvae}
KINDS = tuple(_OPENED)


@dataclass(frozen=True)
class Published:
    """A published tokenizer that was read: its codebook, and the tensors of its encoder."""

    codebook: Codebook
    tower: Tower
    encoder: bytes = field(repr=False)
    """The content of `ENCODER`."""


def read_published(
    path: Path, kind: str | None = None, image_size: int | None = None, device: str = "cpu"
) -> Published:
    """Reads a published file; nothing in it is executed.

    Args:
        path: a VQ-KD checkpoint, or DALL-E's `encoder.pkl` or its state dict.
        kind: "vqkd" or "dvae", which the file must be; None recognises it.
        image_size: pixels, for the dVAE (112 unless given).
        device: "cpu" or "cuda".

    Raises:
        DataError: the file is not such a tokenizer.
    """
    tensors, model = read_tensors(path)
    actual = vqkd.NAME if vqkd.is_vqkd(tensors) else dvae.NAME if dvae.is_dvae(tensors) else None
    if actual is None or kind not in (None, actual):
        found = "neither VQ-KD nor DALL-E's dVAE" if actual is None else f"a {actual} tokenizer"
        raise DataError(f"{path} holds {found}; --vqkd takes a checkpoint of VQ-KD, --dvae the encoder of DALL-E.")
    bias = None
    try:
        if actual == vqkd.NAME:
            weights, codes = vqkd.split(tensors)
        else:
            weights, codes, last_bias = dvae.split(tensors)
            bias = _floats(last_bias)
        tower = _tower(weights, actual, image_size, device)
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError) as error:
        raise _not_such(path, actual, error) from None
    encoder = save(weights)
    source = {"name": path.name, "sha256": sha256_file(path), **({"model": model} if model else {})}
    description = {
        **tower.description(),
        "k": len(codes),
        "metric": "cosine" if actual == vqkd.NAME else INNER_PRODUCT,
        "encoder_sha256": hashlib.sha256(encoder).hexdigest(),
        "imported": source,
        "request": {**asdict(tower.settings), "imported": source},
        "versions": {name: version(name) for name in ("torch", "timm", "numpy", "pillow")},
    }
    counts = np.zeros(len(codes), dtype=np.int64)
    return Published(Codebook(_floats(codes), counts, description, bias), tower, encoder)


def open_encoder(folder: Path | UPath, codebook: Codebook, device: str) -> Tower:
    """Opens the encoder in the folder of an imported tokenizer. Raises DataError if it is missing or was changed."""
    path, kind = folder / ENCODER, codebook.description["library"]
    try:
        content = read_whole(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); import the tokenizer again.") from None
    if hashlib.sha256(content).hexdigest() != codebook.description["encoder_sha256"]:
        raise DataError(f"{path} was changed since it was written (its digest does not match); import it again.")
    try:
        return _tower(load(content), kind, codebook.description["image_size"], device)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _not_such(path, kind, error) from None


def _tower(tensors: dict[str, Tensor], kind: str, image_size: int | None, device: str) -> Tower:
    return Tower(TowerSettings(kind, image_size=image_size), _OPENED[kind](tensors, image_size), device)


def _not_such(path: Path | UPath, kind: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return DataError(f"{path} does not hold the weights of a {kind} tokenizer ({type(error).__name__}: {reason}).")


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    array: Any = tensor.contiguous().numpy()
    return np.ascontiguousarray(array, dtype=np.float32)
