"""Frozen features of images, in memory: of a model's weights, or of a baseline such as raw pixels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ...shared.errors import DataError
from ...shared.images.decode import read_image
from ...shared.images.normalise import Normalise
from ...shared.images.views import Preprocess, center_view, to_array
from ...shared.runtime.loader import OneByOne, batches
from ...shared.sources.records import ImageRecord
from ..model.mapet import MaPeT
from ..weights.weights import Weights
from .labelled import LabelledImages, same_classes

PRETRAINED = "pre-trained"
"""The name of the encoder made of the weights themselves."""


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


@torch.no_grad()
def embed(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features (B, dim) and patch features (B, N, dim) of images (B, 3, S, S), in full float32 precision."""
    # cuDNN would otherwise round float32 to TF32.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        rows = model.forward_features(images)
    return model.forward_head(rows, pre_logits=True), rows[:, 1:]


def refuse_not_finite(features: Tensor, records: Sequence[ImageRecord], what: str) -> None:
    """Raises DataError, which names the image, if a row of `features` (B, ...) holds NaN or infinity; row i belongs to
    `records[i]`, and `what` names the features in the message."""
    finite = torch.isfinite(features).flatten(1).all(1)
    if not finite.all():
        record = records[int((~finite).nonzero()[0])]
        raise DataError(f"{record.path}: {what} hold NaN or infinity for image {record.key!r}; check the weights.")


@dataclass(frozen=True)
class Encoder:
    """A frozen function from normalised images to one feature vector per image."""

    name: str
    """The name of its row in a table, such as "pre-trained"."""
    feature: str
    """What the vector is, in words."""
    encode: Callable[[Tensor], Tensor]
    """Images (B, 3, S, S) float32 to features (B, dim) float32, on the same device."""


def pooled_encoder(weights: Weights, device: str, name: str = PRETRAINED) -> Encoder:
    """The encoder whose feature is the model's pooled output (see `embed`)."""
    model = weights.vit().to(device)
    feature = "mean over patches of the final norm's output"
    if weights.kind == "classifier":
        feature = "norm of the mean over patches of the last block's output, the input of the head"
    return Encoder(name, feature, lambda images: embed(model, images)[0])


def pixel_encoder(side: int) -> Encoder:
    """The baseline whose feature is the image itself, averaged to `side` x `side` normalised pixels."""
    name = f"pixels {side}x{side}"
    return Encoder(name, f"normalised {name}", lambda images: adaptive_avg_pool2d(images, side).flatten(1))


def fresh_weights(weights: Weights) -> Weights:
    """The same model with the initial weights that its seed gives. The caller's random state stays as it is."""
    shape = replace(weights.shape, k=max(weights.shape.k, 1))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(weights.seed)  # torch.manual_seed would seed the GPUs as well
        tensors = MaPeT(shape).state_dict()
    return replace(weights, shape=shape, tensors=tensors)


@dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """The features that one encoder gives for labelled training and validation images."""

    encoder: str
    """Name of the encoder."""
    feature: str
    """What a vector is, in words."""
    preprocess: Preprocess
    train: Tensor
    """(n, dim) float32."""
    train_labels: Tensor
    """(n,) int64, on the same device."""
    val: Tensor
    """(m, dim) float32."""
    val_labels: Tensor
    """(m,) int64, on the same device."""

    def to_json(self) -> dict[str, Any]:
        """Where the features come from; part of the protocol of every evaluation that reads them."""
        return {
            "encoder": self.encoder,
            "feature": self.feature,
            "dim": self.train.shape[1],
            "preprocess": self.preprocess.to_json(),
            "train_images": len(self.train),
            "val_images": len(self.val),
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
) -> list[FrozenFeatures]:
    """The features of all images by each of the encoders, in one pass over the images.

    Raises:
        DataError for an image that cannot be read, or whose features hold NaN or infinity; for classes that do not fit
        (`labelled.same_classes`).
    """
    train, val = same_classes(train, val)
    passes = [_encode_all(encoders, preprocess, images.records, execution) for images in (train, val)]
    labels = [images.labels.to(execution.device) for images in (train, val)]
    return [
        FrozenFeatures(encoder.name, encoder.feature, preprocess, of_train, labels[0], of_val, labels[1])
        for encoder, of_train, of_val in zip(encoders, *passes, strict=True)
    ]


def _encode_all(
    encoders: Sequence[Encoder], preprocess: Preprocess, records: Sequence[ImageRecord], execution: Execution
) -> list[Tensor]:
    """For each encoder, the features (n, dim) of all records."""
    parts = []
    done = 0
    for images in normalised_views(records, preprocess, execution.batch_size, execution.workers, execution.device):
        parts.append([encoder.encode(images) for encoder in encoders])
        for encoder, features in zip(encoders, parts[-1], strict=True):
            refuse_not_finite(features, records[done:], f"features of {encoder.name}")
        done += len(images)
        execution.advance(len(images))
    return [torch.cat(column) for column in zip(*parts, strict=True)]
