"""The interface of a visual tokenizer: a tower, a codebook, and a metric that picks one code for each patch."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from ...shared.artifacts.codes import Tokens
from ...shared.errors import DataError, UsageError
from ...shared.images.views import Preprocess


class Tokenizer(ABC):
    """Turns the pixels of views into grids of token indices.

    Encoding, re-encoding and the pages use this interface only. A subclass sets the attributes in its constructor and
    implements the three abstract methods; `encode` follows from them.

    Pixels are (B, 3, S, S) with S = `preprocess.image_size`, already resized and cropped: uint8 in [0, 255] or
    float32 in [0, 1]. The tokenizer's own scaling (mean and std, or any other) is applied inside `features`.
    """

    preprocess: Preprocess
    """How an image becomes the pixels of its centre view."""
    grid: tuple[int, int]
    """Rows and columns (H, W) of one view's tokens."""
    k: int
    """Number of codes K, at most 2^31; tokens are below it."""
    dim: int
    """Length of one patch's features."""
    unit_length: bool = False
    """Whether `assign` takes the features of `features` only after they were scaled to length one."""
    stride: int | None = None
    """Pixels from one token to the next, of a tokenizer that is convolutional throughout and takes other S, too."""
    fingerprint: str
    """SHA-256 over everything that changes tokens; equal fingerprints mean equal tokens."""
    description: dict[str, Any]
    """The JSON object that a token store embeds as its codebook.json, without the seal.

    It holds at least "format" and "version" (`shared.tokens.codebook`), "fingerprint", "k", "grid" ([H, W]),
    "preprocess" (`Preprocess.to_json`), and what a reader needs to know about how the tokens were made.
    """
    device: torch.device
    """Where `features` computes."""

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """Computes the features of every patch: float32 (B, H * W, dim), row by row, on `device`."""

    @abstractmethod
    def assign(self, features: NDArray[np.float32]) -> tuple[Tokens, NDArray[np.float32]]:
        """Picks a code for each of n patches.

        Args:
            features: (n, dim) float32 from `features`, of length one if `unit_length` is set.

        Returns:
            Tokens (n,) uint16, or uint32 where K is more than 65,536, and the squared distance (n,) float32 of each
            patch to its code. A metric that has no distance returns any value that is smaller for a better match.
        """

    def tokens(self, features: Tensor) -> Tensor:
        """Picks a code for each of n patches, without their distances.

        Args:
            features: (n, dim) float32 on `device`, as `assign` takes them; finite.

        Returns:
            (n,) integers. By default they are those of `assign`, for which the features are copied to the CPU; a
            subclass that computes them on a GPU saves that copy.
        """
        tokens, _ = self.assign(features.cpu().contiguous().numpy())
        return torch.from_numpy(tokens.astype(np.int64))

    @abstractmethod
    def nearly_equal(self, features: NDArray[np.float32], tokens: Tokens, nearest: Tokens) -> NDArray[np.bool_]:
        """Tells rounding ties from wrong tokens.

        Args:
            features: (n, dim) float32 as `assign` takes them.
            tokens: (n,) the tokens to judge.
            nearest: (n,) the tokens that `assign` gives for `features`.

        Returns:
            (n,) bool: whether `tokens` match the features as well as `nearest`, up to the rounding error between
            devices and batch sizes.
        """

    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens of a batch of views: (B, 3, S, S) uint8 in [0, 255] or float32 in [0, 1] -> (B, H, W) int64.

        The result lies on `device`. The batch is one forward pass, and kernels may round differently for another
        batch size; the encoder of a store therefore always passes the same number of views. A tokenizer with a `stride`
        takes any S that is a multiple of it.

        Raises:
            DataError: the features hold NaN or infinity.
            UsageError: `pixels` have another shape, type or range.
        """
        height, width = self._grid_of(pixels)
        features = self.features(pixels)
        finite = torch.isfinite(features).flatten(1).all(1)
        if not finite.all():
            raise DataError(
                f"The tower gives features with NaN or infinity for view {int((~finite).nonzero()[0])} of the batch; "
                "use float32 or another layer, or check its weights."
            )
        if self.unit_length:
            features = normalize(features, dim=-1)
        tokens = self.tokens(features.reshape(-1, self.dim))
        return tokens.to(self.device, torch.int64).reshape(len(pixels), height, width)

    def _grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """The grid (H, W) of the tokens of `pixels`. Raises UsageError for pixels that `encode` does not take."""
        size = self.preprocess.image_size
        side = pixels.shape[-1] if pixels.ndim == 4 else 0
        fits = side == size or (self.stride is not None and side > 0 and side % self.stride == 0)
        if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side) or not fits:
            raise UsageError(f"The tokenizer takes pixels (B, 3, {size}, {size}), not {tuple(pixels.shape)}.")
        if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
            raise UsageError(f"The tokenizer takes pixels as uint8 or as floats in [0, 1], not {pixels.dtype}.")
        # Bicubic resizing of floats overshoots a little; pixels in [0, 255] or normalised ones overshoot a lot.
        if pixels.is_floating_point() and pixels.numel() and not -0.5 <= pixels.min() <= pixels.max() <= 1.5:
            raise UsageError(
                f"The tokenizer takes float pixels in [0, 1], before any normalisation; these are from "
                f"{float(pixels.min()):.4g} to {float(pixels.max()):.4g}."
            )
        if side == size or self.stride is None:
            return self.grid
        return side // self.stride, side // self.stride


def pixels_in_255(pixels: Tensor) -> Tensor:
    """Pixels as a tokenizer takes them, uint8 or float32 in [0, 1], in the range [0, 255]; never changed in place."""
    return pixels * 255 if pixels.is_floating_point() else pixels
