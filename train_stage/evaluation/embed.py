"""Frozen features of images, in memory: of a model's weights, or of a baseline such as raw pixels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, unfold

from ...shared.errors import DataError
from ...shared.images.decode import read_image
from ...shared.images.normalise import Normalise
from ...shared.images.views import Preprocess, center_view, to_array
from ...shared.randomness import seeded_torch
from ...shared.runtime.loader import OneByOne, batches
from ...shared.sources.records import ImageRecord
from ..model.mapet import MaPeT
from ..weights.weights import Weights
from .labelled import LabelledImages, same_classes
from .patch_features import PatchFeatures, PatchWriter

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

PRETRAINED = "pre-trained"
"""The name of the encoder made of the weights themselves."""
_PIXEL_PATCH = 4


@dataclass(frozen=True)
class _CenterViews:
    records: Sequence[ImageRecord]
    preprocess: Preprocess

    def __call__(self, index: int) -> dict[str, Any]:
        return {"pixels": to_array(center_view(read_image(self.records[index])[0], self.preprocess))}


def normalised_views(
    records: Sequence[ImageRecord], preprocess: Preprocess, batch_size: int, workers: int, device: str
) -> Iterator[Tensor]:
    """Yields the images as a model takes them, in order: float32 (B, 3, S, S) on `device`, normalised.

    Raises:
        DataError for an image that cannot be read.
    """
    normalise = Normalise(preprocess.mean, preprocess.std, device)
    count = len(records)
    indices = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    for batch in batches(OneByOne(_CenterViews(records, preprocess)), indices, workers):
        yield normalise(batch["pixels"])


def embed(model: "VisionTransformer", images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features (B, dim) and patch features (B, N, dim) of images (B, 3, S, S), in full float32 precision."""
    return embed_blocks(model, images, [len(model.blocks) - 1])[0]


@torch.no_grad()
def embed_blocks(model: "VisionTransformer", images: Tensor, blocks: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """The features that `embed` gives, of each of some blocks (from 0, ascending): the model's final norm and pooling
    are applied to the output of the block, as DINOv2 does."""
    # cuDNN would otherwise round float32 to TF32.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        outputs: Any = model.forward_intermediates(
            images,
            indices=list(blocks),
            return_prefix_tokens=True,
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
    rows = [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]
    return [(model.forward_head(of_block, pre_logits=True), of_block[:, 1:]) for of_block in rows]


def refuse_not_finite(features: Tensor, records: Sequence[ImageRecord], what: str) -> None:
    """Raises DataError, which names the image, if a row of `features` (B, ...) holds NaN or infinity; row i belongs to
    `records[i]`, and `what` names the features in the message."""
    finite = torch.isfinite(features).flatten(1).all(1)
    if not finite.all():
        record = records[int((~finite).nonzero()[0])]
        raise DataError(f"{record.path}: {what} hold NaN or infinity for image {record.key!r}; check the weights.")


@dataclass(frozen=True)
class Encoder:
    """A frozen function from normalised images to one feature vector per image, and one per patch."""

    name: str
    """The name of its row in a table, such as "pre-trained"."""
    feature: str
    """What the vector is, in words."""
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Images (B, 3, S, S) float32 to features (B, dim) and patch features (B, N, dim), float32, on the same device."""
    patch_feature: str = "the features before the mean over patches"
    """What the vector of a patch is, in words."""
    block: int | None = None
    """The block of the model whose output it is, from 0; None where there is no model."""


def pooled_encoder(weights: Weights, device: str, name: str = PRETRAINED, block: int | None = None) -> Encoder:
    """The encoder whose feature is the model's pooled output (see `embed`), or that of `block`, from 0."""
    model, last = weights.vit().to(device), weights.shape.depth - 1
    block = last if block is None else block
    output = "the last block's output" if block == last else f"the output of block {block} (0 to {last})"
    feature, patch_feature = f"mean over patches of the final norm of {output}", f"the final norm of {output}"
    if block == last:
        feature, patch_feature = "mean over patches of the final norm's output", "the final norm's output"
    if weights.kind == "classifier":
        feature, patch_feature = f"norm of the mean over patches of {output}, the input of the head", output
    return Encoder(name, feature, lambda images: embed_blocks(model, images, [block])[0], patch_feature, block)


def pixel_encoder(side: int) -> Encoder:
    """The baseline whose feature is the image itself, averaged to `side` x `side` normalised pixels; its patches have
    4x4 of them."""

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = adaptive_avg_pool2d(images, side)
        return pixels.flatten(1), unfold(pixels, _PIXEL_PATCH, stride=_PIXEL_PATCH).mT

    name = f"pixels {side}x{side}"
    return Encoder(name, f"normalised {name}", encode, f"normalised {name} in patches of {_PIXEL_PATCH}x{_PIXEL_PATCH}")


def fresh_weights(weights: Weights) -> Weights:
    """The same model with the initial weights that its seed gives. The caller's random state stays as it is."""
    shape = replace(weights.shape, k=max(weights.shape.k, 1))
    with seeded_torch(weights.seed):
        tensors = MaPeT(shape).state_dict()
    return replace(weights, shape=shape, tensors=tensors)


@dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """The features that one encoder gives for labelled training and validation images."""

    encoder: str
    """Name of the encoder."""
    feature: str
    """What a vector is, in words."""
    block: int | None
    """The block of the model whose output it is, from 0; None where there is no model."""
    preprocess: Preprocess
    train: Tensor
    """(n, dim) float32."""
    train_labels: Tensor
    """(n,) int64, on the same device."""
    val: Tensor
    """(m, dim) float32."""
    val_labels: Tensor
    """(m,) int64, on the same device."""
    train_keys: tuple[str, ...] = ()
    """The keys of the training images."""
    patch_feature: str = ""
    """What the vector of a patch is, in words."""
    train_patches: PatchFeatures | None = None
    """Of n images; None if they were not extracted."""
    val_patches: PatchFeatures | None = None
    """Of m images; None if they were not extracted."""

    def to_json(self) -> dict[str, Any]:
        """Where the features come from; part of the protocol of every evaluation that reads them."""
        return {
            "encoder": self.encoder,
            "feature": self.feature,
            **({} if self.block is None else {"block": self.block}),
            "dim": self.train.shape[1],
            "preprocess": self.preprocess.to_json(),
            "train_images": len(self.train),
            "val_images": len(self.val),
            "val_classes": len(torch.unique(self.val_labels)),
        }


@dataclass(frozen=True)
class Execution:
    """How an evaluation is computed; results do not depend on it beyond rounding."""

    batch_size: int = 128
    workers: int = 0
    """Processes that decode images; 0 decodes in this process."""
    device: str = "cpu"
    """cpu or cuda."""
    advance: Callable[[int], None] = lambda count: None
    """Called with the number of images of every batch that was encoded."""


@torch.no_grad()
def extract_features(
    encoders: Sequence[Encoder],
    preprocess: Preprocess,
    train: LabelledImages,
    val: LabelledImages,
    execution: Execution,
    *,
    patches: bool = False,
) -> list[FrozenFeatures]:
    """The features of all images by each of the encoders, in one pass over the images; with `patches` also those of
    each patch, as float16 in temporary files.

    Raises:
        DataError for an image that cannot be read, or whose features hold NaN or infinity; for classes that do not fit
        (`labelled.same_classes`); if the temporary folder has too little room.
    """
    train, val = same_classes(train, val)
    passes = [_encode_all(encoders, preprocess, images.records, execution, patches) for images in (train, val)]
    labels = [images.labels.to(execution.device) for images in (train, val)]
    keys = tuple(record.key for record in train.records)
    return [
        FrozenFeatures(
            encoder.name,
            encoder.feature,
            encoder.block,
            preprocess,
            of_train,
            labels[0],
            of_val,
            labels[1],
            keys,
            encoder.patch_feature,
            train_patches,
            val_patches,
        )
        for encoder, (of_train, train_patches), (of_val, val_patches) in zip(encoders, *passes, strict=True)
    ]


def _encode_all(
    encoders: Sequence[Encoder],
    preprocess: Preprocess,
    records: Sequence[ImageRecord],
    execution: Execution,
    patches: bool,
) -> list[tuple[Tensor, PatchFeatures | None]]:
    """For each encoder, the features (n, dim) of all records, and those of their patches if they are to be kept."""
    parts: list[list[Tensor]] = [[] for _ in encoders]
    writers = [PatchWriter(len(records)) if patches else None for _ in encoders]
    done = 0
    for images in normalised_views(records, preprocess, execution.batch_size, execution.workers, execution.device):
        for encoder, part, writer in zip(encoders, parts, writers, strict=True):
            features, of_patches = encoder.encode(images)
            refuse_not_finite(features, records[done:], f"features of {encoder.name}")
            part.append(features)
            if writer:
                half = of_patches.half()
                refuse_not_finite(half, records[done:], f"float16 patch features of {encoder.name}")
                writer.write(half)
        done += len(images)
        execution.advance(len(images))
    kept = [writer.finish() if writer else None for writer in writers]
    return [(torch.cat(part), of_patches) for part, of_patches in zip(parts, kept, strict=True)]
