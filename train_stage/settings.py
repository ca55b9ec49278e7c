"""Every setting of pre-training: one documented structure, filled from a recipe file and overrides, checked as a whole.

The defaults are the paper's for ViT-B/16 at 224 pixels (arXiv 2306.07346, section 4).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..shared.errors import UsageError
from .model import SIZES, Shape

RECIPES = Path(__file__).parent.parent / "recipes"
_CHOICES = {"precision": ("auto", "float32", "bfloat16"), "interpolation": ("bicubic", "bilinear")}


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UsageError(sentence)


@dataclass
class ModelSettings:
    name: str | None = "vit-base"
    """vit-tiny, vit-small, vit-base or vit-large; sets dim, depth and heads unless they are given."""
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    patch_size: int = 16
    """Pixels."""
    image_size: int = 224
    """Pixels; image_size / patch_size must be the side of the token grid."""
    visible: int | None = None
    """How many patches of the permutation are given, class token not counted; default a quarter of them."""
    drop_path: float = 0.1
    """Drop path in the last block, rising linearly from 0 in the first."""

    def complete(self) -> "ModelSettings":
        """Fills in, in place, what the name and the sizes imply, and checks the whole."""
        if self.name is not None:
            known = [f"vit-{size}" for size in SIZES]
            _require(self.name in known, f"model.name {self.name!r} is unknown; choose from {', '.join(known)}.")
            dim, depth, heads = SIZES[self.name.removeprefix("vit-")]
            self.dim, self.depth, self.heads = self.dim or dim, self.depth or depth, self.heads or heads
        missing = [name for name in ("dim", "depth", "heads") if not getattr(self, name)]
        _require(not missing, f"model.{', model.'.join(missing)} must be given where model.name is null.")
        _require(0 <= self.drop_path < 1, f"model.drop_path {self.drop_path} must lie in [0, 1).")
        _require(self.patch_size > 0 and self.image_size > 0, "model.patch_size and model.image_size must be positive.")
        patches = self.shape(k=2).patches
        self.visible = patches // 4 if self.visible is None else self.visible
        _require(0 <= self.visible < patches, f"model.visible {self.visible} must be less than the {patches} patches.")
        return self

    def shape(self, k: int) -> Shape:
        return Shape(self.dim, self.depth, self.heads, self.patch_size, self.image_size, k)


@dataclass
class OptimizerSettings:
    """AdamW. No weight decay on biases, norms, LayerScale, positions and class token."""

    lr: float = 1.5e-3
    """Peak learning rate, for the whole global batch."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_lr: float = 1e-6
    warmup_epochs: float = 10.0
    """Linear warm-up; fractions of an epoch are fine."""
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    clip_grad: float | None = 3.0
    """Largest norm of all gradients together; null does not clip."""

    def __post_init__(self):
        _require(self.lr > 0, f"optimizer.lr {self.lr} must be positive.")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optimizer.betas must be two numbers in [0, 1).",
        )
        _require(self.warmup_epochs >= 0, f"optimizer.warmup_epochs {self.warmup_epochs} must not be negative.")
        _require(self.clip_grad is None or self.clip_grad > 0, "optimizer.clip_grad must be positive or null.")


@dataclass
class DataSettings:
    color_jitter: float = 0.4
    """Strength of brightness, contrast and saturation jitter, for the student only; 0 is none."""
    interpolation: str = "bicubic"
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    workers: int | None = None
    """Processes that decode images; default none on the CPU, up to 16 on CUDA."""
    skip_missing: bool = False
    """Leave out images that have no tokens, and say how many, instead of stopping."""

    def __post_init__(self):
        _require(0 <= self.color_jitter <= 1, f"data.color_jitter {self.color_jitter} must lie in [0, 1].")
        choices = _CHOICES["interpolation"]
        _require(self.interpolation in choices, f"data.interpolation must be one of {', '.join(choices)}.")
        _require(len(self.mean) == len(self.std) == 3, "data.mean and data.std must have three numbers.")


@dataclass
class TrainSettings:
    epochs: int = 300
    batch_size: int = 2048
    """Global batch: images per optimizer step."""
    accumulate: int = 1
    """Split each batch into this many equal parts, to fit in memory; the gradient stays the same."""
    precision: str = "auto"
    """auto (bfloat16 autocast on CUDA, float32 on the CPU), float32 or bfloat16."""
    seed: int = 0
    log_every: int = 10
    """Steps between lines of metrics.jsonl; losses are means over them."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = 2
    """How many checkpoints stay on disk."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_last"):
            _require(getattr(self, name) >= 1, f"train.{name} {getattr(self, name)} must be at least 1.")
        _require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size {self.batch_size} is no multiple of train.accumulate {self.accumulate}.",
        )
        choices = _CHOICES["precision"]
        _require(self.precision in choices, f"train.precision must be one of {', '.join(choices)}.")


@dataclass
class Settings:
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def resolve(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from the defaults, a recipe (a shipped name or a YAML file) and overrides like "optimizer.lr=1e-3".

    Raises UsageError for an unknown recipe, an unknown key, or a value of the wrong type or range.
    """
    schema = OmegaConf.structured(Settings)
    for override in overrides:
        _require("=" in override, f"--set {override}: write it as key=value, such as optimizer.lr=1e-3.")
    where = f"--recipe {recipe}"
    try:
        layers = [OmegaConf.load(_recipe_path(recipe))] if recipe else []
        merged = OmegaConf.merge(schema, *layers)
        where = f"--set {' '.join(overrides)}"
        settings = OmegaConf.to_object(OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides))))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise UsageError(f"{where}: {f'{key}: ' if key else ''}{reason}. {_known_keys(key)}") from None
    except (OSError, ValueError, YAMLError) as error:
        raise UsageError(f"{where} cannot be read: {str(error).splitlines()[0]}.") from None
    settings.model.complete()
    return settings


def _recipe_path(recipe: str | Path) -> Path:
    shipped = {path.stem: path for path in RECIPES.glob("*.yaml")}
    path = shipped.get(str(recipe), Path(recipe))
    _require(
        path.is_file(), f"--recipe {recipe} is neither a file nor a shipped recipe ({', '.join(sorted(shipped))})."
    )
    return path


def _known_keys(key: str | None) -> str:
    defaults = asdict(Settings())
    group = (key or "").split(".")[0]
    keys = [f"{group}.{name}" for name in defaults[group]] if group in defaults else list(defaults)
    return f"Known: {', '.join(keys)}."
