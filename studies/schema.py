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
K = 8192
"""Codes of a codebook unless it says otherwise, and of the published tokenizers."""
_REMEDY = "correct it (docs/study.md lists the fields)"
_PASSED_BY_THE_STUDY = ("images", "codebook", "out", "device")

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
    flops_of: str | None = None
    """An objective: the FLOPs that `images` images cost it with the same model."""

    def __post_init__(self) -> None:
        if (self.images is None) == (self.flops is None):
            raise ValueError("a budget has either images or flops")
        if self.flops_of is not None and self.images is None:
            raise ValueError("a budget with flops_of has images, not flops")


class Tokenizer(Struct, forbid_unknown_fields=True):
    """Options of build-codebook (or of import) and of encode-shards, named as their parameters."""

    codebook: Values = field(default_factory=dict)
    tokens: Values = field(default_factory=dict)
    published: Values = field(default_factory=dict)
    """The file of a published tokenizer, as vqkd or dvae, instead of a codebook that is trained."""

    def __post_init__(self) -> None:
        if self.published and self.codebook:
            raise ValueError("a tokenizer has either codebook or published")

    @property
    def k(self) -> int:
        """Codes."""
        return int(self.codebook.get("k", K))  # type: ignore[arg-type]  # `read_study` has checked it


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
    finetuning_of: dict[Label, Values] = field(default_factory=dict)
    """Settings of the fine-tunings of a model, which come before those of all."""
    curve_points: Annotated[int, Meta(ge=0, le=1000)] = 0
    """How often the k-NN accuracy is measured during each pre-training."""
    drawings: Drawings | None = None
    train_images: Number | None = None
    """How many training images there are; they are counted if it is not stated."""

    def __post_init__(self) -> None:
        if self.baseline not in self.objectives:
            raise ValueError(f"baseline {self.baseline!r} is none of the objectives: {', '.join(self.objectives)}")
        for budget in self.budgets.values():
            if budget.flops_of is not None and budget.flops_of not in self.objectives:
                raise ValueError(
                    f"flops_of {budget.flops_of!r} is none of the objectives: {', '.join(self.objectives)}"
                )
        unknown = set(self.finetuning_of) - set(self.models)
        if unknown:
            raise ValueError(f"finetuning_of {min(unknown)!r} is none of the models: {', '.join(self.models)}")
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
        for part, source, function, values in (
            ("codebook", "build_codebook", "build_codebook", tokenizer.codebook),
            ("published", "import_tokens", "import_tokenizer", tokenizer.published),
            ("tokens", "encode_shards", "encode_shards", tokenizer.tokens),
        ):
            _check_options(values, source, function, f"{path}: tokenizers.{label}.{part}")
        if tokenizer.published and len({"vqkd", "dvae"} & set(tokenizer.published)) != 1:
            raise DataError(f"{path}: tokenizers.{label}.published: give either vqkd or dvae, the path of the file.")
    return study


def _path_of(name: str | Path) -> Path:
    shipped = {path.stem: path for path in sorted(STUDIES.glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"STUDY {name} is no file and no shipped study; choose from {', '.join(shipped)}.")
    return path


def _check_options(values: Mapping[str, Any], module: str, function: str, place: str) -> None:
    parameters = read_signature(_PACKAGE / "tokenize_stage" / f"{module}.py", function).parameters
    known = [name for name in parameters if name not in _PASSED_BY_THE_STUDY]
    for name, value in values.items():
        if name not in known:
            raise DataError(f"{place}: {function} has no option {name!r} to set; known: {', '.join(known)}.")
        types = parameters[name].types
        if not any(_fits(value, type_) for type_ in types):
            raise DataError(f"{place}.{name} is {value!r}; give {_in_words(types)}.")


def _fits(value: object, type_: str) -> bool:
    """Whether a value of YAML is one of a parameter's type, given as source text."""
    if type_ == "None" or value is None:
        return type_ == "None" and value is None
    if isinstance(value, bool) or type_ == "bool":
        return isinstance(value, bool) and type_ == "bool"
    if type_ in ("int", "float"):
        return isinstance(value, int) or (type_ == "float" and isinstance(value, float))
    return isinstance(value, list) == ("[" in type_) and (isinstance(value, str | list) or type_ == "Path")


def _in_words(types: tuple[str, ...]) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}
    named = [words[type_] for type_ in types if type_ in words]
    return " or ".join(named) if named else "a list"
