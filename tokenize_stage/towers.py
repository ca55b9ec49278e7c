"""Frozen image towers: any open_clip or timm model, as a function from pixels to a grid of patch features."""

import difflib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..shared.errors import DataError, MapetError, UsageError
from ..shared.images.normalise import Normalise
from ..shared.images.views import Preprocess

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RANDOM = "none"
_SEED_OF_RANDOM_WEIGHTS = 0


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

    def __init__(self, settings: TowerSettings, opened: "_Opened", device: str):
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
class _Opened:
    module: nn.Module
    intermediates: Callable[[Tensor, int, bool], Tensor]
    library: str
    preprocess: Preprocess


def open_tower(settings: TowerSettings, device: str = "cpu") -> Tower:
    """Opens a tower by the name that its library uses.

    `settings.tower` is an open_clip model name, `local-dir:PATH`, `hf-hub:ID` or `timm:NAME`; `pretrained` a tag or a
    file, or "none" for seeded random weights. Raises UsageError for an unknown name or tag and DataError for weights
    that are missing or cannot be fetched.
    """
    if settings.precision not in PRECISIONS:
        raise UsageError(f"--precision {settings.precision} is unknown; choose from {', '.join(PRECISIONS)}.")
    if settings.tower.startswith("timm:"):
        return Tower(settings, _open_timm(settings), device)
    return Tower(settings, _open_clip(settings), device)


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


@contextmanager
def _seeded_if(random: bool) -> Iterator[None]:
    """Random weights must be the same each time the tower is opened."""
    with torch.random.fork_rng(enabled=random):
        if random:
            torch.manual_seed(_SEED_OF_RANDOM_WEIGHTS)
        yield


def _unknown(kind: str, name: str, known: list[str]) -> UsageError:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return UsageError(f"{kind} {name!r} is unknown; did you mean {', '.join(close or known[:5])}?")


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


@contextmanager
def _explained(settings: TowerSettings) -> Iterator[None]:
    """Turns whatever a library raises or logs while it opens a model into one sentence."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MapetError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
        raise DataError(
            f"The weights of --tower {settings.tower} (--pretrained {settings.pretrained}) could not be fetched or "
            f"loaded: {reason}."
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def _open_clip(settings: TowerSettings) -> _Opened:
    import open_clip

    name, random = settings.tower, settings.pretrained == RANDOM
    schema = name.partition(":")[0] if ":" in name else None
    tag = None if random or schema else settings.pretrained or "openai"
    if schema == "local-dir":
        _check_local_dir(Path(name.partition(":")[2]), random)
    elif schema is None:
        _check_builtin(name, tag)
    elif schema != "hf-hub":
        raise UsageError(f"--tower {name} is unknown; use an open_clip name, local-dir:PATH, hf-hub:ID or timm:NAME.")
    with _explained(settings), _seeded_if(random):
        model = open_clip.create_model(
            name,
            pretrained=tag,
            load_weights=not random,
            require_pretrained=not random,
            # OpenAI's weights were trained with QuickGELU; with GELU they give silently different features.
            force_quick_gelu=bool(tag and _tag_config(name, tag).get("quick_gelu")),
            force_image_size=settings.image_size,
        )
        fields = open_clip.get_model_preprocess_cfg(model)
    visual = model.visual

    def intermediates(pixels: Tensor, layer: int, final_norm: bool) -> Tensor:
        # Without `intermediates_only` open_clip's ModifiedResNet fails when features are not pooled.
        given = visual.forward_intermediates(
            pixels, indices=[layer], normalize_intermediates=final_norm, intermediates_only=True, stop_early=True
        )
        return given["image_intermediates"][0]

    return _Opened(visual, intermediates, "open_clip", _clip_preprocess(name, fields))


def _tag_config(name: str, tag: str) -> dict[str, Any]:
    import open_clip

    return open_clip.get_pretrained_cfg(name.replace("/", "-"), tag) or {}


def _check_local_dir(path: Path, random: bool) -> None:
    if not (path / "open_clip_config.json").is_file():
        raise DataError(f"{path} has no open_clip_config.json; local-dir: takes a folder in open_clip's layout.")
    if not random and not any(file.suffix in (".safetensors", ".bin", ".pth") for file in path.iterdir()):
        raise DataError(f"{path} holds no weights (*.safetensors, *.bin, *.pth); put them there, or --pretrained none.")


def _check_builtin(name: str, tag: str | None) -> None:
    import open_clip

    cleaned = name.replace("/", "-")
    if cleaned not in open_clip.list_models():
        raise _unknown("--tower", name, open_clip.list_models())
    if tag is None or Path(tag).is_file():
        return
    tags = open_clip.list_pretrained_tags_by_model(cleaned)
    if tag not in tags:
        raise UsageError(
            f"--pretrained {tag} is neither a file nor a tag of {name}; its tags are {', '.join(tags) or 'none'}."
        )


def _clip_preprocess(name: str, fields: dict[str, Any]) -> Preprocess:
    size = fields["size"] if isinstance(fields["size"], int) else fields["size"][0]
    if fields["resize_mode"] not in ("shortest", "squash") or fields["size"] not in (size, (size, size), [size, size]):
        raise UsageError(
            f"--tower {name} resizes by {fields['resize_mode']!r} to {fields['size']}, which is not supported."
        )
    return Preprocess(
        image_size=size,
        resize=fields["resize_mode"],
        resize_size=size,
        interpolation=fields["interpolation"],
        mean=tuple(fields["mean"]),
        std=tuple(fields["std"]),
    )


def _open_timm(settings: TowerSettings) -> _Opened:
    import timm

    name, random = settings.tower.removeprefix("timm:"), settings.pretrained == RANDOM
    file = settings.pretrained if settings.pretrained and Path(settings.pretrained).is_file() else None
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise _unknown("--tower timm:", base, timm.list_models())
    if not random and not file and settings.pretrained:
        tags = [model.partition(".")[2] for model in timm.list_models(f"{base}.*", pretrained=True)]
        if settings.pretrained not in tags:
            raise UsageError(
                f"--pretrained {settings.pretrained} is neither a file nor a tag of timm:{base}; "
                f"its tags are {', '.join(tags) or 'none'}."
            )
        name = f"{base}.{settings.pretrained}"
    with _explained(settings), _seeded_if(random):
        model = timm.create_model(
            name,
            pretrained=not random,
            pretrained_cfg_overlay={"file": file} if file else None,
        )
        # Convolutional backbones take any size; transformers must resample their position embeddings.
        if settings.image_size and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=settings.image_size)
    config = timm.data.resolve_model_data_config(model)

    def intermediates(pixels: Tensor, layer: int, final_norm: bool) -> Tensor:
        return model.forward_intermediates(
            pixels, indices=[layer], norm=final_norm, intermediates_only=True, stop_early=True, output_fmt="NCHW"
        )[0]

    return _Opened(model, intermediates, "timm", _timm_preprocess(base, config, settings.image_size))


def _timm_preprocess(name: str, config: dict[str, Any], image_size: int | None) -> Preprocess:
    size = image_size or config["input_size"][1]
    squash = config["crop_mode"] == "squash"
    if not squash and (config["crop_mode"] != "center" or config["crop_pct"] > 1):
        raise UsageError(
            f"--tower timm:{name} sees a padded image (crop_mode {config['crop_mode']!r}, "
            f"crop_pct {config['crop_pct']}), which is not supported; choose another tower."
        )
    return Preprocess(
        image_size=size,
        resize="squash" if squash else "shortest",
        resize_size=size if squash else int(size / config["crop_pct"]),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
