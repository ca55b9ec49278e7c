"""What a study's YAML file holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from ..shared.artifacts.fields import Count, Positive, Share, checked
from ..shared.artifacts.yaml_file import read_yaml
from ..shared.errors import DataError, UsageError
from ..shared.runtime.static_signature import read_signature

_PACKAGE = Path(__file__).parent.parent
STUDIES = Path(__file__).parent / "shipped"
RANDOM_INIT, FROM_SCRATCH, PIXELS = "random init", "from scratch", "pixels"
FROZEN = ("linear", "attentive", "knn")
_REMEDY = "correct it (docs/study.md lists the fields)"
_PASSED_BY_THE_STUDY = ("images", "codebook", "out")

Label = Annotated[str, Meta(min_length=1, max_length=60)]
Number = Annotated[int, Meta(ge=1, le=2**40)]
Value = str | int | float | bool | None | list[str | int | float]
Values = dict[str, Value]


class Drawings(Struct, forbid_unknown_fields=True):
    """How many of the package's own drawings are made, instead of images that are given."""

    train: Number
    val: Number


class Budget(Struct, forbid_unknown_fields=True):
    """What a pre-training may cost: images seen, or floating-point operations."""

    images: Number | None = None
    flops: Positive | None = None

    def __post_init__(self) -> None:
        if (self.images is None) == (self.flops is None):
            raise ValueError("a budget has either images or flops")


class Tokenizer(Struct, forbid_unknown_fields=True):
    """Options of build-codebook and of encode-shards, named as their parameters."""

    codebook: Values = field(default_factory=dict)
    tokens: Values = field(default_factory=dict)


class Study(Struct, forbid_unknown_fields=True):
    """A grid of tokenizers, objectives, models, budgets and seeds; each entry but the seeds has a name."""

    tokenizers: Annotated[dict[Label, Tokenizer], Meta(min_length=1)]
    objectives: Annotated[dict[Label, Values], Meta(min_length=1)]
    """Settings of pre-training in which the rows differ."""
    models: Annotated[dict[Label, Values], Meta(min_length=1)]
    """Settings of pre-training that state the model."""
    budgets: Annotated[dict[Label, Budget], Meta(min_length=1)]
    baseline: Label
    """The objective that all others are compared with."""
    seeds: Annotated[list[Count], Meta(min_length=1)]
    evaluations: Annotated[list[Literal["linear", "attentive", "knn", "finetuned"]], Meta(min_length=1)]
    comparisons: list[Literal["random init", "from scratch", "pixels"]] = field(default_factory=list)
    recipe: str | None = None
    settings: Values = field(default_factory=dict)
    """Settings of all pre-trainings."""
    warmup: Share = 0.1
    """Share of a pre-training's epochs, unless optimizer.warmup_epochs is set."""
    finetuning_recipe: str | None = None
    finetuning: Values = field(default_factory=dict)
    """Settings of all fine-tunings."""
    curve_points: Annotated[int, Meta(ge=0, le=1000)] = 0
    """How often the k-NN accuracy is measured during each pre-training."""
    drawings: Drawings | None = None
    train_images: Number | None = None
    """How many training images there are; they are counted if it is not stated."""

    def __post_init__(self) -> None:
        if self.baseline not in self.objectives:
            raise ValueError(f"baseline {self.baseline!r} is none of the objectives: {', '.join(self.objectives)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has a number twice")
        if len(set(self.evaluations)) < len(self.evaluations):
            raise ValueError("evaluations has a name twice")
        taken = {RANDOM_INIT, FROM_SCRATCH, PIXELS} & set(self.objectives)
        if taken:
            raise ValueError(f"an objective may not be named {min(taken)!r}, which is a comparison")
        if FROM_SCRATCH in self.comparisons and "finetuned" not in self.evaluations:
            raise ValueError("the comparison 'from scratch' needs the evaluation finetuned")
        if {RANDOM_INIT, PIXELS} & set(self.comparisons) and not self.frozen:
            raise ValueError("the comparisons 'random init' and 'pixels' need linear, attentive or knn in evaluations")

    @property
    def frozen(self) -> list[str]:
        """The evaluations that read frozen features."""
        return [name for name in self.evaluations if name in FROZEN]


def read_study(name: str | Path) -> Study:
    """The study of a shipped name or of a YAML file.

    Raises:
        UsageError if there is no such study, DataError if the file does not hold one.
    """
    path = _path_of(name)
    study = checked(read_yaml(path), Study, path, _REMEDY)
    for label, tokenizer in study.tokenizers.items():
        for command, values in (("build_codebook", tokenizer.codebook), ("encode_shards", tokenizer.tokens)):
            _check_options(values, command, f"{path}: tokenizers.{label}")
    return study


def _path_of(name: str | Path) -> Path:
    shipped = {path.stem: path for path in sorted(STUDIES.glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"STUDY {name} is no file and no shipped study; choose from {', '.join(shipped)}.")
    return path


def _check_options(values: Mapping[str, Any], command: str, place: str) -> None:
    source = _PACKAGE / "tokenize_stage" / f"{command}.py"
    known = [name for name in read_signature(source, command).parameters if name not in _PASSED_BY_THE_STUDY]
    for name in values:
        if name not in known:
            raise DataError(f"{place}: {command} has no option {name!r} to set; known: {', '.join(known)}.")
