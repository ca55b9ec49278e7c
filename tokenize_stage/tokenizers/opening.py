"""Opens the tokenizer that a codebook folder describes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upath import UPath

from ...shared.errors import UsageError
from ...shared.runtime.devices import choose_device
from ...shared.storage.remote import as_path, is_remote
from ...shared.tokens.codebook import Codebook, read_description
from .base import Tokenizer
from .nearest_code import NearestCode, open_same_tower
from .published import KINDS, open_encoder, read_published


@dataclass(frozen=True)
class SavedTokenizer:
    """A codebook folder that was read and checked. Its tower is not open yet, which would take seconds."""

    codebook: Codebook = field(repr=False)
    description: dict[str, Any] = field(repr=False)
    """As `Tokenizer.description`."""
    path: Path | UPath

    @property
    def fingerprint(self) -> str:
        return self.codebook.fingerprint

    def open(self, *, tower: str | None = None, device: str = "auto", compile: bool = False) -> Tokenizer:
        """Opens the tower and returns the tokenizer.

        Args:
            tower: where the tower is now, if it moved.
            device: "auto", "cpu" or "cuda".
            compile: whether the tower is compiled.

        Raises:
            FingerprintMismatch: the tower at that place is another one.
            DataError: the tower's weights are missing.
            UsageError: the tower's name or the device is unknown, or there is no C++ compiler to compile with.
        """
        if self.codebook.description["library"] not in KINDS:
            opened = open_same_tower(self.codebook, tower, choose_device(device))
        elif tower:
            raise UsageError(f"--tower {tower}: {self.path} holds its own encoder; leave the option out.")
        else:
            opened = open_encoder(self.path, self.codebook, choose_device(device))
        if compile:
            opened.compile()
        return NearestCode(opened, self.codebook, self.description)


def read_tokenizer(path: str | Path) -> SavedTokenizer:
    """Reads a codebook folder or its URL. Raises DataError if it is missing, damaged or was changed."""
    codebook = Codebook.load(path)
    return SavedTokenizer(codebook, read_description(as_path(path) / "codebook.json"), as_path(path))


def load_tokenizer(path: str | Path, *, tower: str | None = None, device: str = "auto") -> Tokenizer:
    """Opens a visual tokenizer, to call its `encode`.

    `encode` takes pixels (B, 3, S, S) with S = `preprocess.image_size`, float32 in [0, 1] or uint8, before any
    normalisation, and returns tokens (B, H, W), int64.

    Args:
        path: A codebook folder or its URL, or a published file: a VQ-KD checkpoint, or DALL-E's encoder as a
            pickled module or a state dict. Nothing in such a file is executed.
        tower: Where the codebook's tower is now, if it moved.
        device: auto, cpu or cuda.

    Returns:
        The tokenizer; `grid`, `k` and `fingerprint` describe its tokens.

    Raises:
        DataError: The codebook or the weights of its tower are missing, damaged or were changed.
        FingerprintMismatch: `tower` is another tower than the codebook's.
        UsageError: The device is unknown.
    """
    place = as_path(path)
    if not is_remote(place) and place.is_file():
        if tower:
            raise UsageError(f"--tower {tower}: {path} holds its own encoder; leave the option out.")
        published = read_published(Path(path), device=choose_device(device))
        return NearestCode(published.tower, published.codebook, published.codebook.as_json(""))
    return open_tokenizer(path, tower=tower, device=device)


def open_tokenizer(path: str | Path, *, tower: str | None = None, device: str = "auto") -> Tokenizer:
    """Opens the tokenizer of a codebook folder or its URL; see `SavedTokenizer.open` and `read_tokenizer`."""
    return read_tokenizer(path).open(tower=tower, device=device)
