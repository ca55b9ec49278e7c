"""Frozen image towers: any open_clip or timm model, as a function from pixels to a grid of patch features."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...shared.errors import UsageError
from ...shared.images.normalise import Normalise
from ...shared.images.views import Preprocess

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TowerSettings:
    """What to open, and which features to take from it. The first three say where; the rest changes tokens."""

    tower: str = "RN50x64"
    pretrained: str | None = None
    image_size: int | None = None
    layer: int = -1
    final_norm: bool = False
    precision: str = "float32"


class Tower:
    """A frozen tower on a device. `features` is the only way in.

    `preprocess` says what it must see, `grid` (rows, columns) and `dim` what it gives, `identity` what makes it
    this tower and no other (library, architecture, weights).
    """

    def __init__(self, settings: TowerSettings, opened: "OpenedModel", device: str):
        self.settings, self.preprocess, self.device = settings, opened.preprocess, torch.device(device)
        self.identity = {
            "library": opened.library,
            "architecture": _architecture(opened.module),
            "weights_sha256": _weights_sha256(opened.module, settings.image_size is not None),
        }
        dtype = PRECISIONS[settings.precision]
        self._module = opened.module.eval().requires_grad_(False).to(self.device, dtype)
        self._intermediates = opened.intermediates
        self._normalise = Normalise(self.preprocess.mean, self.preprocess.std, self.device)
        blank = torch.zeros(1, 3, self.preprocess.image_size, self.preprocess.image_size, dtype=torch.uint8)
        _, self.dim, height, width = self._maps(blank).shape
        self.grid = (height, width)

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
        """uint8 pixels (B, 3, image_size, image_size) -> float32 features (B, rows * columns, dim), raster order."""
        return self._maps(pixels).float().flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class OpenedModel:
    module: nn.Module
    intermediates: Callable[[Tensor, int, bool], Tensor]
    library: str
    preprocess: Preprocess


def _weights_sha256(module: nn.Module, resized: bool) -> str:
    """Over names and values of all weights; position embeddings resampled to another image size are left out, being
    derived from the rest and not the same to the last bit on every machine."""
    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if resized and "pos" in name:
            continue
        whole.update(f"{name}{tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return whole.hexdigest()


def _architecture(module: nn.Module) -> dict[str, Any]:
    """What the weights alone do not say: the class, the kinds of its layers (GELU or QuickGELU, for one), how many
    heads share the attention's weights, and the strides."""
    parts = list(module.modules())
    return {
        "class": type(module).__name__,
        "layers": sorted({type(part).__name__ for part in parts if not list(part.children())}),
        "heads": sorted({part.num_heads for part in parts if isinstance(getattr(part, "num_heads", None), int)}),
        "strides": sorted({str(part.stride) for part in parts if hasattr(part, "stride")}),
    }
