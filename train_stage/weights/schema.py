"""What state.json, weights.json and an export's config.json hold. Fields that are not named here are left alone."""

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from ...shared.artifacts.codes import MAX_K
from ...shared.artifacts.fields import Count, Finite, Positive, PositiveTriple, Sha256, Size, Text, Triple
from ...shared.errors import DataError
from ..model.shape import Shape

Target = Literal["tokens", "features"]
"""What the decoder of a pre-training predicts."""
Depth = Annotated[int, Meta(ge=1, le=4096)]
ClassNames = Annotated[list[Text], Meta(min_length=1)]


class ShapeFields(Struct):
    """`model.shape.Shape`."""

    dim: Size
    depth: Depth
    heads: Size
    patch_size: Size
    image_size: Size
    k: Annotated[int, Meta(ge=0, le=MAX_K)] = 0
    mlp_ratio: Positive = 4.0

    def __post_init__(self) -> None:
        if self.heads > self.dim or self.dim % self.heads or self.image_size % self.patch_size:
            raise ValueError("its sizes do not divide each other")

    def to_shape(self) -> Shape:
        return Shape(self.dim, self.depth, self.heads, self.patch_size, self.image_size, self.k, self.mlp_ratio)


class InputFields(Struct):
    """`weights.Input`."""

    mean: Triple
    std: PositiveTriple
    interpolation: Literal["bicubic", "bilinear"]
    crop_pct: Annotated[float, Meta(gt=0, le=1)] | UnsetType = UNSET


class StoredFile(Struct):
    """Size and digest of a checkpoint's file."""

    bytes: Count
    sha256: Sha256


class Start(Struct):
    """The weights that a run was started from."""

    file: Text
    sha256: Sha256


Rate = Annotated[float, Meta(ge=0, le=1e300)]


class Extension(Struct, frozen=True):
    """Epochs that were added to a finished run, with a learning-rate schedule of their own."""

    step: Count
    """The step at which it begins: that at which the run was finished."""
    epochs: Annotated[int, Meta(ge=1, le=2**31)]
    """Of the run in all, at the end of the extension."""
    warmup_lr: Rate
    """Learning rate at the first step of the warm-up: that at which the run had ended."""
    lr: Positive
    """Peak learning rate."""
    min_lr: Rate
    """Learning rate at the end of the cosine."""
    warmup_epochs: Rate
    time: Text
    """When it was begun, UTC."""
    version: Text
    """Of mapet."""


class LossWatch(Struct):
    """`training.bad_steps.LossMonitor.to_json`."""

    mean: Finite | None
    in_a_row: Count


class PendingStep(Struct):
    """`training.step_metrics.StepMetrics.to_json`."""

    loss: Finite | None
    right: list[Finite]
    guesses: list[Count]
    gradient_norm: Finite | None
    images: Count
    lr: Finite
    problem: Text | None = None


class CheckpointState(Struct):
    """state.json of a checkpoint, as far as its weights are concerned, whatever task its run has."""

    step: Count
    files: dict[Annotated[str, Meta(pattern=r"\A(model|optimizer|ema)\.safetensors\Z")], StoredFile]
    seed: int | UnsetType = UNSET
    input: InputFields | UnsetType = UNSET
    model: ShapeFields | UnsetType = UNSET
    class_names: ClassNames | UnsetType = UNSET
    task: Text = "pretraining"
    target: Target = "tokens"

    def __post_init__(self) -> None:
        if "model.safetensors" not in self.files:
            raise ValueError("it has no model.safetensors")


class RunState(CheckpointState, kw_only=True):
    """state.json of a checkpoint from which a run resumes."""

    settings: dict[str, dict[str, Any]]
    seed: int
    images: Count
    keys_sha256: Sha256
    init: Start | None
    loss_watch: LossWatch
    pending: list[PendingStep]
    codebook_fingerprint: Text | UnsetType = UNSET
    view: dict[str, Any] | UnsetType = UNSET
    labels_sha256: Sha256 | UnsetType = UNSET
    masks_sha256: Sha256 | UnsetType = UNSET
    extensions: list[Extension] = []

    def __post_init__(self) -> None:
        CheckpointState.__post_init__(self)
        needed = (self.model, self.input, self.codebook_fingerprint, self.view)
        if self.task == "pretraining" and any(field is UNSET for field in needed):
            raise ValueError("a pre-training names its model, input, codebook_fingerprint and view")
        of_classifier = (self.model, self.input, self.class_names, self.labels_sha256)
        if self.task == "finetuning" and any(field is UNSET for field in of_classifier):
            raise ValueError("a fine-tuning names its model, input, class_names and labels_sha256")
        of_segmenter = (self.model, self.input, self.class_names, self.masks_sha256)
        if self.task == "segmentation" and any(field is UNSET for field in of_segmenter):
            raise ValueError("a segmentation names its model, input, class_names and masks_sha256")


class ImportedWeights(Struct):
    """weights.json of a folder that `import` wrote."""

    shape: ShapeFields
    input: InputFields
    seed: int
    sha256: Sha256 | UnsetType = UNSET
    class_names: ClassNames | UnsetType = UNSET
    target: Target = "tokens"


class TimmArguments(Struct):
    """`model_args` of config.json."""

    img_size: Size
    patch_size: Size
    embed_dim: Size
    depth: Depth
    num_heads: Size
    mlp_ratio: Positive

    def to_shape(self) -> Shape:
        sizes = (self.embed_dim, self.depth, self.num_heads, self.patch_size, self.img_size, 0, self.mlp_ratio)
        return ShapeFields(*sizes).to_shape()


class ExportConfig(Struct):
    """config.json of a folder that `export` wrote. Exports before the digest lack the last field."""

    model_args: TimmArguments
    pretrained_cfg: InputFields
    model_sha256: Sha256 | UnsetType = UNSET
    label_names: ClassNames | UnsetType = UNSET


def refuse_other_sizes(shape: Shape, sizes: Mapping[str, tuple[int, ...]], file: object) -> None:
    """Compares the stated shape with the tensors, before a model of that shape is built.

    Raises:
        DataError if width, depth, hidden width or the numbers of patches or of codes differ.
    """
    blocks = {name.split(".")[1] for name in sizes if name.startswith("blocks.")}
    hidden = shape.dim * shape.mlp_ratio
    stated = {
        "depth": (shape.depth, len(blocks)),
        "patch embedding": ((shape.dim, 3, shape.patch_size, shape.patch_size), sizes.get("patch_embed.proj.weight")),
        "positions": ((1, shape.patches + 1, shape.dim), sizes.get("pos_embed")),
        "hidden layer": (
            (int(hidden) if isfinite(hidden) else 0, shape.dim),
            sizes.get("blocks.0.mlp.fc1.weight"),
        ),
    }
    if "decoder.weight" in sizes:
        stated["head"] = ((shape.k, shape.dim), sizes["decoder.weight"])
    for name, (expected, there) in stated.items():
        if expected != there:
            raise DataError(
                f"{file} does not hold the weights of a MaPeT model ({name} {there}, and its description says "
                f"{expected}); get it again from where it came from."
            )
