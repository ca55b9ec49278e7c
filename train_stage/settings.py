"""The settings of pre-training, fine-tuning and segmentation: documented structures, filled from a recipe and overrides
and checked as a whole.

The defaults are the paper's for ViT-B/16 at 224 pixels (arXiv 2306.07346, section 4). A default of MISSING is derived
from other settings by `resolve`; a resolved structure has a value everywhere.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..shared.artifacts.yaml_file import read_yaml
from ..shared.errors import DataError, UsageError
from .model.shape import SIZES, Shape

RECIPES = Path(__file__).parent.parent / "recipes"
OBJECTIVES = ("mapet", "pim", "mim")
TARGETS = ("tokens", "features")
ATTENTION = ("sdpa", "flex")
TOKENS, FEATURES = TARGETS
FLEX = ATTENTION[1]
_CHOICES = {
    "objective.name": OBJECTIVES,
    "objective.target": TARGETS,
    "objective.visible_change": ("linear", "random"),
    "objective.query_choice": ("last", "random"),
    "objective.permutation": ("uniform", "block"),
    "objective.masking": ("block", "uniform"),
    "data.interpolation": ("bicubic", "bilinear"),
    "data.shuffle": ("full", "shards"),
    "train.precision": ("auto", "float32", "bfloat16"),
    "train.on_bad_step": ("stop", "skip"),
    "execution.parallel": ("ddp", "fsdp"),
    "execution.attention": ATTENTION,
}


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UsageError(sentence)


def _check_choices(group: str, settings: object) -> None:
    for key, choices in _CHOICES.items():
        of, name = key.split(".")
        if of == group:
            value = getattr(settings, name)
            _require(value in choices, f"{key} {value!r} is unknown; choose from {', '.join(choices)}.")


def check_numbers(group: str, settings: object) -> None:
    """Raises UsageError for a number of a group of settings that is not finite or does not fit into 64 bits."""
    for name, value in vars(settings).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float):
                _require(math.isfinite(number), f"{group}.{name} {number} must be a finite number.")
            elif isinstance(number, int):
                _require(-(1 << 63) <= number < 1 << 64, f"{group}.{name} {number} must fit into 64 bits.")


def _require_at_least_zero(group: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value is None or value >= 0, f"{group}.{name} {value} must not be negative.")


@dataclass
class ModelSettings:
    name: str | None = "vit-base"
    """vit-tiny, vit-small, vit-base or vit-large; sets dim, depth and heads unless they are given."""
    dim: int = MISSING
    """Width; must be a multiple of `heads`. Derived from the name."""
    depth: int = MISSING
    """Number of blocks. Derived from the name."""
    heads: int = MISSING
    """Attention heads. Derived from the name."""
    patch_size: int = 16
    """Pixels."""
    image_size: int = 224
    """Pixels; image_size / patch_size must be the side of the token grid."""
    drop_path: float = 0.1
    """Drop path rate of the last block, rising linearly from 0 in the first."""

    def shape(self, k: int) -> Shape:
        """The sizes of the model that predicts `k` codes. Raises UsageError for sizes that do not fit together."""
        return Shape(self.dim, self.depth, self.heads, self.patch_size, self.image_size, k)


@dataclass
class ObjectiveSettings:
    """What is predicted from what. `mim` reads mask_ratio and masking, `mapet` and `pim` read the others."""

    name: str = "mapet"
    """mapet (masked and permuted), pim (permuted: no auxiliary rows) or mim (masked, one stream, as in BEiT)."""
    target: str = "tokens"
    """What is predicted of a patch: tokens (its token, by cross-entropy) or features (what the tower of --teacher
    computes for it, by cosine similarity): a control, in which only the head and the loss differ."""
    visible: int = MISSING
    """How many patches of the permutation are given, not counting the class token; default a quarter of the patches."""
    visible_to: int | None = None
    """Other end of a schedule or range that starts at `visible`; null keeps `visible` for the whole run."""
    visible_change: str = "linear"
    """With visible_to: linear (a schedule, from the first step to the last) or random (drawn for each step)."""
    query_rows: int | None = None
    """How many ranks get a query row, that is a prediction; null is all of them."""
    query_choice: str = "random"
    """Which: random (drawn for each step; the same loss on average) or last (XLNet's partial prediction)."""
    permutation: str = "uniform"
    """uniform (over patches, as published) or block (squares in random order, their patches in random order)."""
    permutation_block: int = 4
    """Side of these squares, in patches; where they begin is random, those at the border are cut."""
    mask_ratio: float = 0.4
    """Share of the patches that mim masks."""
    masking: str = "block"
    """How mim masks: block (rectangles, as BEiT) or uniform (over patches)."""

    def __post_init__(self) -> None:
        check_numbers("objective", self)
        _check_choices("objective", self)
        _require(0 < self.mask_ratio < 1, f"objective.mask_ratio {self.mask_ratio} must lie between 0 and 1.")
        _require(self.permutation_block >= 1, "objective.permutation_block must be at least 1.")
        _require(self.query_rows is None or self.query_rows >= 1, "objective.query_rows must be at least 1, or null.")

    def masked(self, patches: int) -> int:
        """How many of the patches mim masks: at least one, and not all."""
        return min(max(round(self.mask_ratio * patches), 1), patches - 1)


@dataclass
class OptimizerSettings:
    """AdamW. No weight decay on biases, norms, LayerScale, positions and class token."""

    lr: float = 1.5e-3
    """Peak learning rate, for the whole global batch."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_lr: float = 1e-6
    """Learning rate at the first step of the warm-up."""
    warmup_epochs: float = 10.0
    """Linear warm-up; fractions of an epoch are fine."""
    weight_decay: float = 0.05
    """Decoupled, as in AdamW."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of AdamW's first and second moments."""
    eps: float = 1e-8
    """Added to the denominator of AdamW's update."""
    clip_grad: float | None = 3.0
    """Largest norm of all gradients together; null does not clip."""

    def __post_init__(self) -> None:
        check_numbers("optimizer", self)
        _require(self.lr > 0, f"optimizer.lr {self.lr} must be positive.")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optimizer.betas must be two numbers in [0, 1).",
        )
        _require_at_least_zero("optimizer", self, "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "eps")
        _require(self.clip_grad is None or self.clip_grad > 0, "optimizer.clip_grad must be positive or null.")


@dataclass
class DataSettings:
    color_jitter: float = 0.4
    """Strength of brightness, contrast and saturation jitter, for the student only; 0 is none."""
    interpolation: str = "bicubic"
    """Filter of the student's resize; the tower's is fixed by the codebook."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Of the student's pixels in [0, 1], by channel (red, green, blue); default ImageNet's."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Their standard deviation, by channel."""
    workers: int | None = None
    """Processes that decode images; default none on the CPU, up to 16 on CUDA."""
    skip_missing: bool = False
    """Leave out images that have no tokens, and say how many, instead of stopping."""
    shuffle: str = "full"
    """What an epoch shuffles: full (all images), or shards (their order, then the images of a few of them at a time,
    which reads few files at once; for slow disks, and for remote images)."""
    shuffle_shards: int = 16
    """With shuffle=shards: how many shards have their images shuffled together."""
    cache: str | None = None
    """Folder that keeps remote tars for the next epoch; null deletes them when the order has passed them."""
    cache_gb: float | None = None
    """How much of them it keeps, in 10^9 bytes; null is everything."""

    def __post_init__(self) -> None:
        check_numbers("data", self)
        _require(self.cache_gb is None or self.cache_gb > 0, "data.cache_gb must be positive, or null.")
        _require(self.shuffle_shards >= 1, f"data.shuffle_shards {self.shuffle_shards} must be at least 1.")
        _require(0 <= self.color_jitter <= 1, f"data.color_jitter {self.color_jitter} must lie in [0, 1].")
        _require_at_least_zero("data", self, "workers")
        _check_choices("data", self)
        _require(len(self.mean) == len(self.std) == 3, "data.mean and data.std must have three numbers.")
        _require(all(number > 0 for number in self.std), f"data.std {self.std} must be positive numbers.")


@dataclass
class TrainSettings:
    epochs: int = 300
    """Passes over all images; each epoch sees one stored view of each."""
    batch_size: int = 2048
    """Global batch: images per optimizer step, whatever the number of processes."""
    precision: str = "auto"
    """auto (bfloat16 autocast on CUDA, float32 on the CPU), float32 or bfloat16."""
    seed: int = 0
    """Of the initial weights, batch order, permutations, drop path and jitter."""
    ema: float | None = None
    """Keep an exponential moving average of the weights with this decay, such as 0.9999; what probe, features and
    export then use. null keeps none."""
    ema_warmup: bool = False
    """Raise the decay of step n from 0 to train.ema as 1 - (n + 1)^(-2/3): without it, the average of a run of some
    hundreds of steps consists of its first weights."""
    on_bad_step: str = "stop"
    """At a loss that is NaN, infinite or a spike: stop (with the step and its keys), or skip (no update; counted)."""
    spike: float | None = None
    """A loss this many times the running mean of the losses before it is a spike; null looks for none."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; losses are means over them."""
    log_keys: bool = False
    """Write the keys of every step's images to RUN/keys/."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_last: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps stay as well."""
    wandb: str | None = None
    """Weights & Biases project that also gets the metrics; needs `pip install wandb`."""

    def precision_on(self, device: str) -> str:
        """The precision of a step on "cpu" or "cuda": "float32" or "bfloat16"."""
        if self.precision != "auto":
            return self.precision
        return "bfloat16" if device == "cuda" else "float32"

    def __post_init__(self) -> None:
        check_numbers("train", self)
        counts = ("epochs", "batch_size", "log_every", "checkpoint_every", "keep_last", "keep_every")
        for name in counts:
            value = getattr(self, name)
            _require(value is None or value >= 1, f"train.{name} {value} must be at least 1.")
        _require(self.ema is None or 0 < self.ema < 1, f"train.ema {self.ema} must lie between 0 and 1, or be null.")
        _require(self.ema is not None or not self.ema_warmup, "train.ema_warmup needs train.ema, such as 0.99.")
        _require(self.spike is None or self.spike > 1, f"train.spike {self.spike} must be larger than 1, or null.")
        _check_choices("train", self)


@dataclass
class ExtensionSettings:
    """The learning-rate schedule of the epochs that `--extend` adds to a finished run. AdamW's moments are kept."""

    lr: float | None = None
    """Peak learning rate; null is optimizer.lr."""
    min_lr: float | None = None
    """Learning rate at the end of the cosine; null is optimizer.min_lr."""
    warmup_epochs: float | None = None
    """Linear warm-up from the learning rate at which the run ended; null is a tenth of the added epochs, at most 1."""

    def __post_init__(self) -> None:
        check_numbers("extension", self)
        _require(self.lr is None or self.lr > 0, f"extension.lr {self.lr} must be positive, or null.")
        _require_at_least_zero("extension", self, "min_lr", "warmup_epochs")


@dataclass
class ProbeSettings:
    """The quality of the frozen features, measured during the run and written to RUN/probe.jsonl."""

    images: str | None = None
    """Labelled training images: a tar, a folder of class folders, or a pattern of tars."""
    val: str | None = None
    """Labelled validation images. Their classes are joined with those of `images` by name."""
    labels: str | None = None
    """File of the labels of `images`: a number or name a line in the sorted order of the images, or a CSV or JSON lines
    with a key column."""
    val_labels: str | None = None
    """The same for `val`."""
    label_field: str | None = None
    """Field of the tars' JSON members that holds the label; of a file of labels, its label column."""
    classes: str | None = None
    """File of class names, for class numbers beside names: line i, counted from 0, is the name of class i."""
    every: int = 1000
    """Steps between probes; one more is made at the end."""
    linear: bool = False
    """Also fit the linear probe; k-NN alone is much faster."""
    max_images: int = 20000
    """A seeded subset of this many training images is used, and of a quarter as many validation images."""

    def __post_init__(self) -> None:
        check_numbers("probe", self)
        _require((self.images is None) == (self.val is None), "probe.images and probe.val are given together.")
        _require(self.every >= 1, f"probe.every {self.every} must be at least 1.")
        _require(self.max_images >= 4, f"probe.max_images {self.max_images} must be at least 4.")


@dataclass
class ExecutionSettings:
    """How a step is computed, never what: losses and gradients are equal to rounding, and a run may change these."""

    micro_batch: int | None = 256
    """Images that a process computes at once: its share of a batch is accumulated in equal parts of at most so many, so
    that one batch_size serves any number of GPUs. null computes the whole share at once."""
    parallel: str = "ddp"
    """With several processes: ddp (each has the whole model), or fsdp (FSDP2: weights, gradients and optimizer are
    sharded, for what does not fit)."""
    grad_checkpointing: bool = False
    """Keep only the rows between blocks for backward and compute the rest again: far less memory, a third slower."""
    compile: bool = False
    """torch.compile each block."""
    attention: str = "sdpa"
    """Of pre-training on a GPU: sdpa (one masked call of PyTorch's kernels), or flex (FlexAttention, a kernel generated
    for the windows of MaPeT and PIM; needs a C++ compiler)."""
    loss_chunk: int | None = 4096
    """How many predicted rows have logits at a time (with K above 65,536 in proportion fewer); null is all of them."""

    def __post_init__(self) -> None:
        check_numbers("execution", self)
        _require(self.loss_chunk is None or self.loss_chunk >= 1, "execution.loss_chunk must be at least 1, or null.")
        _require(
            self.micro_batch is None or self.micro_batch >= 1, "execution.micro_batch must be at least 1, or null."
        )
        _check_choices("execution", self)


@dataclass
class Settings:
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    extension: ExtensionSettings = field(default_factory=ExtensionSettings)
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _refuse_frozen_fresh(freeze: int, from_scratch: bool) -> None:
    _require(
        not (freeze and from_scratch),
        "model.freeze would keep blocks of fresh weights; set one of model.freeze and model.from_scratch.",
    )


@dataclass
class ClassifierSettings:
    """The fine-tuned model. Width, depth, heads and patch size are those of the weights that it starts from."""

    image_size: int = MISSING
    """Pixels, a multiple of the patch size; positions are resampled. Derived from the weights."""
    drop_path: float = 0.1
    """Drop path rate of the last block, rising linearly from 0 in the first."""
    classes: int | None = None
    """Outputs of the head; null is one per class of the training images."""
    freeze: int = 0
    """Leave the embedding and so many of the first blocks as they are; 0 trains everything."""
    from_scratch: bool = False
    """Start from fresh weights of the same shape, as a control."""

    def __post_init__(self) -> None:
        check_numbers("model", self)
        _require(0 <= self.drop_path < 1, f"model.drop_path {self.drop_path} must lie in [0, 1).")
        _require(self.freeze >= 0, f"model.freeze {self.freeze} must not be negative.")
        _require(self.classes is None or self.classes >= 1, "model.classes must be at least 1, or null.")
        _refuse_frozen_fresh(self.freeze, self.from_scratch)


@dataclass
class AugmentSettings:
    """Augmentation of the training images, drawn for each (seed, epoch, key); Mixup and CutMix for each step."""

    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    """Lowest and highest area of the random crop, as a fraction of the image's."""
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Lowest and highest ratio of its width to its height."""
    flip: float = 0.5
    """Probability of mirroring left to right."""
    rand_augment: str | None = "rand-m9-mstd0.5"
    """timm's name of a RandAugment policy, such as rand-m9-mstd0.5-inc1; null applies none."""
    erasing: float = 0.25
    """Probability of random erasing: a rectangle becomes normal noise, pixel by pixel."""
    mixup: float = 0.8
    """Alpha of Mixup's beta distribution; 0 switches it off."""
    cutmix: float = 1.0
    """Alpha of CutMix's beta distribution; 0 switches it off."""
    mix_probability: float = 1.0
    """Share of the steps that are mixed."""
    mix_switch: float = 0.5
    """Share of the mixed steps that get CutMix, if Mixup is on as well."""
    label_smoothing: float = 0.1
    """Share of a target that is spread over all classes."""

    def __post_init__(self) -> None:
        check_numbers("augment", self)
        for name in ("flip", "erasing", "mix_probability", "mix_switch"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"augment.{name} {value} must be a probability from 0 to 1.")
        _require(0 <= self.label_smoothing < 1, "augment.label_smoothing must lie in [0, 1).")
        _require(self.mixup >= 0 and self.cutmix >= 0, "augment.mixup and augment.cutmix must not be negative.")
        low, high = self._pair("crop_scale")
        _require(0 < low <= high <= 1, "augment.crop_scale must be two fractions, the lower one first.")
        low, high = self._pair("crop_ratio")
        _require(
            0 < low <= high < float("inf"), "augment.crop_ratio must be two positive numbers, the lower one first."
        )

    def _pair(self, name: str) -> tuple[float, float]:
        values = getattr(self, name)
        _require(len(values) == 2, f"augment.{name} must have two numbers.")
        return values[0], values[1]

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in any step."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass
class FinetuneOptimizerSettings(OptimizerSettings):
    """AdamW. No weight decay on 1-D parameters, positions and class token."""

    lr: float = 5e-4
    """Peak learning rate of the head, for the whole global batch."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = 20.0
    """Linear warm-up; fractions of an epoch are fine."""
    clip_grad: float | None = None
    """Largest norm of all gradients together; null does not clip."""
    layer_decay: float = 0.65
    """Each layer's learning rate is this share of that of the layer above it; 1 gives all the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 < self.layer_decay <= 1, f"optimizer.layer_decay {self.layer_decay} must lie in (0, 1].")


def _refuse_cache(data: DataSettings) -> None:
    _require(data.cache is None and data.cache_gb is None, "data.cache is of pre-training on remote tars.")


@dataclass
class FinetuneDataSettings(DataSettings):
    color_jitter: float = 0.0
    """Not used in fine-tuning: RandAugment has it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(not self.color_jitter, "data.color_jitter is of pre-training; set augment.rand_augment instead.")
        _refuse_cache(self)


@dataclass
class FinetuneTrainSettings(TrainSettings):
    epochs: int = 100
    """Passes over all training images."""
    batch_size: int = 512
    """Global batch: images per optimizer step, whatever the number of processes."""


@dataclass
class ValidationSettings:
    """Accuracy on the validation images during the run, written to RUN/probe.jsonl."""

    every: int | None = None
    """Steps between evaluations; null is once per epoch. One more is made at the end."""
    crop: float = 0.9
    """The centre crop's share of the resized image; also recorded in the weights, as timm's crop_pct."""
    batch_size: int = 128
    """Images per forward pass."""

    def __post_init__(self) -> None:
        _check_validation(self)
        _require(0 < self.crop <= 1, f"validation.crop {self.crop} must lie in (0, 1].")


@dataclass
class FinetuneSettings:
    """The settings of fine-tuning; their defaults are the published ones of ViT-B/16."""

    model: ClassifierSettings = field(default_factory=ClassifierSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    optimizer: FinetuneOptimizerSettings = field(default_factory=FinetuneOptimizerSettings)
    data: FinetuneDataSettings = field(default_factory=FinetuneDataSettings)
    train: FinetuneTrainSettings = field(default_factory=FinetuneTrainSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class SegmenterSettings:
    """The segmentation model. Width, depth, heads and patch size are those of the weights that it starts from."""

    image_size: int = MISSING
    """Pixels of a crop, a multiple of the patch size; positions are resampled. Derived from the weights."""
    drop_path: float = 0.15
    """Drop path rate of the last block, rising linearly from 0 in the first."""
    channels: int = 768
    """Of UPerNet's head, a multiple of 16; the auxiliary head has at most 256."""
    dropout: float = 0.1
    """Share of the channels that are dropped before a pixel is classified."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss."""
    freeze: int = 0
    """Leave the embedding and so many of the first blocks as they are; 0 trains everything."""
    from_scratch: bool = False
    """Start from fresh weights of the same shape, as a control."""

    def __post_init__(self) -> None:
        check_numbers("model", self)
        for name in ("drop_path", "dropout"):
            _require(0 <= getattr(self, name) < 1, f"model.{name} {getattr(self, name)} must lie in [0, 1).")
        _require(
            self.channels >= 16 and self.channels % 16 == 0, f"model.channels {self.channels} must be a multiple of 16."
        )
        _require_at_least_zero("model", self, "freeze", "auxiliary_weight")
        _refuse_frozen_fresh(self.freeze, self.from_scratch)


@dataclass
class CropSettings:
    """Augmentation of the training images, drawn for each (seed, epoch, key)."""

    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Lowest and highest shorter side of an image, as a multiple of the crop's; what it does not fill is ignored."""
    flip: float = 0.5
    """Probability of mirroring left to right."""

    def __post_init__(self) -> None:
        check_numbers("augment", self)
        _require(
            len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 16,
            "augment.scale must be two numbers up to 16, the lower one first.",
        )
        _require(0 <= self.flip <= 1, f"augment.flip {self.flip} must be a probability from 0 to 1.")


@dataclass
class SegmentOptimizerSettings(FinetuneOptimizerSettings):
    """AdamW. No weight decay on 1-D parameters, positions and class token."""

    lr: float = 5e-5
    """Peak learning rate of what follows the blocks, for the whole global batch."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_lr: float = 0.0
    """Learning rate at the first step of the warm-up."""
    warmup_epochs: float = 1.2
    """Linear warm-up; fractions of an epoch are fine."""
    layer_decay: float = 0.75
    """Each layer's learning rate is this share of that of the layer above it; 1 gives all the same."""


@dataclass
class SegmentDataSettings(DataSettings):
    color_jitter: float = 0.4
    """Strength of brightness, contrast and saturation jitter; 0 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_cache(self)


@dataclass
class SegmentTrainSettings(TrainSettings):
    epochs: int = 127
    """Passes over all training images."""
    batch_size: int = 16
    """Global batch: images per optimizer step, whatever the number of processes."""


@dataclass
class SegmentValidationSettings:
    """Figures of the validation images during the run, written to RUN/probe.jsonl."""

    every: int | None = None
    """Steps between evaluations; null measures at the end of the run only."""
    batch_size: int = 16
    """Windows per forward pass."""

    def __post_init__(self) -> None:
        _check_validation(self)


def _check_validation(validation: "ValidationSettings | SegmentValidationSettings") -> None:
    check_numbers("validation", validation)
    every, size = validation.every, validation.batch_size
    _require(every is None or every >= 1, f"validation.every {every} must be at least 1, or null.")
    _require(size >= 1, f"validation.batch_size {size} must be at least 1.")


@dataclass
class SegmentSettings:
    """The settings of `train segment --head upernet`; their defaults are the published ones of ViT-B/16 on ADE20K."""

    model: SegmenterSettings = field(default_factory=SegmenterSettings)
    augment: CropSettings = field(default_factory=CropSettings)
    optimizer: SegmentOptimizerSettings = field(default_factory=SegmentOptimizerSettings)
    data: SegmentDataSettings = field(default_factory=SegmentDataSettings)
    train: SegmentTrainSettings = field(default_factory=SegmentTrainSettings)
    validation: SegmentValidationSettings = field(default_factory=SegmentValidationSettings)
    execution: ExecutionSettings = field(default_factory=ExecutionSettings)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def flat(settings: "RunSettings") -> dict[str, Any]:
    """All settings by key, such as "optimizer.lr"."""
    return {f"{group}.{name}": value for group, values in settings.to_json().items() for name, value in values.items()}


class RunSettings(Protocol):
    """The groups of settings that every task has, and all that the machinery of a run knows of them."""

    @property
    def optimizer(self) -> OptimizerSettings: ...
    @property
    def data(self) -> DataSettings: ...
    @property
    def train(self) -> TrainSettings: ...
    @property
    def execution(self) -> ExecutionSettings: ...

    def to_json(self) -> dict[str, Any]: ...


def resolve(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from the defaults, a recipe (a shipped name or a YAML file) and overrides such as "optimizer.lr=1e-3".

    Raises UsageError for an unknown recipe, an unknown key, or a value of the wrong type or range.
    """
    settings = cast(Settings, _filled(Settings, recipe, overrides, _derive))
    _check_model(settings.model)
    _check_visible(settings.objective, settings.model.shape(k=2).patches)
    _require(
        not settings.execution.compile or settings.objective.visible_to is None,
        "execution.compile needs a fixed number of rows; leave out objective.visible_to, or execution.compile.",
    )
    return settings


def resolve_finetuning(
    recipe: str | Path | None, overrides: Sequence[str], image_size: int, model_input: Mapping[str, Any]
) -> FinetuneSettings:
    """The settings of fine-tuning, as `resolve` reads them.

    `image_size` and `model_input` (mean, std, interpolation) are those of the weights, unless others are given.
    Raises UsageError as `resolve` does.
    """
    return cast(FinetuneSettings, _filled_for(FinetuneSettings, recipe, overrides, image_size, model_input))


def resolve_segmenting(
    recipe: str | Path | None, overrides: Sequence[str], image_size: int, model_input: Mapping[str, Any]
) -> SegmentSettings:
    """The settings of fine-tuned segmentation; arguments and errors are those of `resolve_finetuning`."""
    return cast(SegmentSettings, _filled_for(SegmentSettings, recipe, overrides, image_size, model_input))


def _filled_for(
    kind: type, recipe: str | Path | None, overrides: Sequence[str], image_size: int, model_input: Mapping[str, Any]
) -> Any:
    """The settings of a model that starts from weights of that image size and input."""

    def derive(merged: Any) -> None:
        if OmegaConf.is_missing(merged.model, "image_size"):
            merged.model.image_size = image_size

    defaults = {"data": {name: model_input[name] for name in ("mean", "std", "interpolation")}}
    return _filled(kind, recipe, overrides, derive, defaults)


def _filled(
    kind: type,
    recipe: str | Path | None,
    overrides: Sequence[str],
    derive: Callable[[Any], None],
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """A structure of settings, from its defaults, `defaults`, a recipe and overrides."""
    schema = OmegaConf.structured(kind)
    for override in overrides:
        _require("=" in override, f"--set {override}: write it as key=value, such as optimizer.lr=1e-3.")
    source = f"--recipe {recipe}"
    try:
        layers = [_load_recipe(_recipe_path(recipe), recipe)] if recipe else []
        merged = OmegaConf.merge(
            schema, OmegaConf.create(dict(defaults or {})), *map(_without_nulls_of_derived, layers)
        )
        source = f"--set {' '.join(overrides)}"
        overriding = _without_nulls_of_derived(OmegaConf.from_dotlist(list(overrides)))
        merged = OmegaConf.merge(merged, overriding)
        derive(merged)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise UsageError(f"{source}: {f'{key}: ' if key else ''}{reason}. {_known_keys(kind, key)}") from None
    except (OSError, TypeError, ValueError, OverflowError, RecursionError, YAMLError) as error:
        raise UsageError(f"{source} cannot be read: {str(error).splitlines()[0]}.") from None


_SIZES = ("dim", "depth", "heads")
_DERIVED = {"model": (*_SIZES, "image_size"), "objective": ("visible",)}
"""Settings that `_derive` fills in; a null in a recipe or an override means that it should."""


def _without_nulls_of_derived(layer: Any) -> Any:
    for group, names in _DERIVED.items():
        content = layer.get(group) if isinstance(layer, DictConfig) else None
        if isinstance(content, DictConfig):
            for name in names:
                if name in content and content[name] is None:
                    del content[name]
    return layer


def _derive(merged: Any) -> None:
    """Fills in what the model's name and sizes imply."""
    model = merged.model
    if model.name is not None:
        known = [f"vit-{size}" for size in SIZES]
        _require(model.name in known, f"model.name {model.name!r} is unknown; choose from {', '.join(known)}.")
        for key, value in zip(_SIZES, SIZES[model.name.removeprefix("vit-")], strict=True):
            if OmegaConf.is_missing(model, key):
                model[key] = value
    absent = [key for key in _SIZES if OmegaConf.is_missing(model, key)]
    _require(not absent, f"model.{', model.'.join(absent)} must be given where model.name is null.")
    if OmegaConf.is_missing(merged.objective, "visible"):
        patches = (model.image_size // model.patch_size) ** 2 if model.patch_size > 0 else 0
        merged.objective.visible = patches // 4


def _check_model(model: ModelSettings) -> None:
    check_numbers("model", model)
    sizes = {"dim": model.dim, "depth": model.depth, "heads": model.heads}
    absent = [name for name, value in sizes.items() if value < 1]
    _require(not absent, f"model.{', model.'.join(absent)} must be at least 1.")
    _require(0 <= model.drop_path < 1, f"model.drop_path {model.drop_path} must lie in [0, 1).")
    _require(model.patch_size > 0 and model.image_size > 0, "model.patch_size and model.image_size must be positive.")


def _check_visible(objective: ObjectiveSettings, patches: int) -> None:
    for name, value in (("visible", objective.visible), ("visible_to", objective.visible_to)):
        _require(
            value is None or 0 <= value < patches,
            f"objective.{name} {value} must be at least 0 and less than the {patches} patches.",
        )


def _load_recipe(path: Path, recipe: object) -> Any:
    """The settings in a recipe. Raises UsageError for anything but nested names and values."""
    try:
        content = read_yaml(path)
    except DataError as error:
        raise UsageError(f"--recipe {recipe}: {error}") from None
    _require(content is None or isinstance(content, dict), f"--recipe {recipe}: {path} holds no settings by name.")
    return OmegaConf.create(content or {})


def _recipe_path(recipe: str | Path) -> Path:
    shipped = {path.stem: path for path in RECIPES.glob("*.yaml")}
    path = shipped.get(str(recipe), Path(recipe))
    _require(
        path.is_file(), f"--recipe {recipe} is neither a file nor a shipped recipe ({', '.join(sorted(shipped))})."
    )
    return path


def _known_keys(kind: type, key: str | None) -> str:
    defaults = asdict(kind())
    group = (key or "").split(".")[0]
    keys = [f"{group}.{name}" for name in defaults[group]] if group in defaults else list(defaults)
    return f"Known: {', '.join(keys)}."
