"""A frozen image tower, such as an open_clip or timm model: a function from pixels to a grid of patch features."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.errors import UsageError
from ...shared.images.normalise import Normalise
from ...shared.images.views import Preprocess
from ...shared.runtime.console import say
from ...shared.runtime.devices import refuse_missing_compiler

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TowerSettings:
    """Which model to open, and which of its features to take; `layer` and what follows it change tokens."""

    tower: str = "RN50x64"
    pretrained: str | None = None
    image_size: int | None = None
    layer: int = -1
    final_norm: bool = False
    precision: str = "float32"


class Tower:
    """A frozen tower on a device, called through `features`.

    `preprocess` turns an image into the pixels that the tower takes; `grid` (rows, columns) is its grid of patches and
    `dim` the length of a patch's features; `identity` (library, architecture, weights) differs between any two
    towers.
    """

    def __init__(self, settings: TowerSettings, opened: "OpenedModel", device: str):
        self.settings, self.preprocess, self.device = settings, opened.preprocess, torch.device(device)
        self.identity = {
            "library": opened.library,
            "architecture": opened.architecture or _architecture(opened.module),
            "weights_sha256": _weights_sha256(opened.module, settings.image_size is not None),
        }
        dtype = PRECISIONS[settings.precision]
        self._module = opened.module.eval().requires_grad_(False).to(self.device, dtype)
        self._intermediates = opened.intermediates
        self._normalise = Normalise(self.preprocess.mean, self.preprocess.std, self.device)
        blank = torch.zeros(1, 3, self.preprocess.image_size, self.preprocess.image_size, dtype=torch.uint8)
        _, self.dim, height, width = self._maps(blank).shape
        self.grid = (height, width)

    def compile(self) -> None:
        """Compiles the model with torch.compile, which fuses what lies between its products; features are equal to
        rounding. Raises UsageError if the machine has no C++ compiler."""
        refuse_missing_compiler("--compile")
        if self.device.type == "cpu":
            say("Warning: on the CPU a compiled tower is slower, in bfloat16 many times; leave --compile out.")
        self._intermediates = torch.compile(self._intermediates)

    def description(self) -> dict[str, Any]:
        """Everything about the tower that a codebook's JSON records."""
        return {
            **self.identity,
            "tower": self.settings.tower,
            "pretrained": self.settings.pretrained,
            "image_size": self.settings.image_size,
            "layer": self.settings.layer,
            "final_norm": self.settings.final_norm,
            "precision": self.settings.precision,
            "preprocess": self.preprocess.to_json(),
            "grid": list(self.grid),
            "dim": self.dim,
        }

    @torch.inference_mode()
    def _maps(self, pixels: Tensor) -> Tensor:
        scaled = self._normalise(pixels)
        settings = self.settings
        try:
            # cuDNN would otherwise choose its kernels by speed and round float32 to TF32.
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
                maps = self._intermediates(
                    scaled.to(PRECISIONS[settings.precision]), settings.layer, settings.final_norm
                )
        except (AssertionError, IndexError, ValueError) as error:
            raise UsageError(f"--layer {settings.layer} does not fit tower {settings.tower}: {error}.") from None
        if maps.ndim != 4:
            raise UsageError(f"--layer {settings.layer} of tower {settings.tower} gives no grid of patches.")
        return maps

    def features(self, pixels: Tensor) -> Tensor:
        """Computes patch features: pixels (B, 3, S, S) in [0, 255] -> float32 (B, rows * columns, dim), row by row.

        S is `preprocess.image_size`; pixels are uint8 or float32, and float32 ones are changed in place.
        """
        return self._maps(pixels).float().flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class OpenedModel:
    """A model as its library opened it: `intermediates` takes normalised pixels, a layer and whether to apply the
    final norm, and returns feature maps (B, dim, rows, columns)."""

    module: nn.Module
    intermediates: Callable[[Tensor, int, bool], Tensor]
    library: str
    preprocess: Preprocess
    architecture: dict[str, Any] | None = None
    """What the weights do not show; None takes it from `module`."""


def _weights_sha256(module: nn.Module, resized: bool) -> str:
    """SHA-256 over the names and values of all weights.

    Position embeddings that were resampled to another image size are left out: they follow from the rest, and machines
    differ in their last bits.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if resized and "pos" in name:
            continue
        whole.update(f"{name}{tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return whole.hexdigest()


def _architecture(module: nn.Module) -> dict[str, Any]:
    """Properties that the weights do not show: the class, the types of its layers (such as GELU or QuickGELU), the
    numbers of attention heads, and the strides."""
    parts = list(module.modules())
    return {
        "class": type(module).__name__,
        "layers": sorted({type(part).__name__ for part in parts if not list(part.children())}),
        "heads": sorted({part.num_heads for part in parts if isinstance(getattr(part, "num_heads", None), int)}),
        "strides": sorted({str(part.stride) for part in parts if hasattr(part, "stride")}),
    }
