"""Images through frozen weights, in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ...shared.images.decode import read_image
from ...shared.images.normalise import Normalise
from ...shared.images.records import ImageRecord
from ...shared.images.views import Preprocess, center_view, to_array
from ...shared.runtime.loader import OneByOne, batches
from ..model.mapet import MaPeT
from ..weights.weights import Weights


@dataclass(frozen=True)
class _CenterViews:
    records: Sequence[ImageRecord]
    preprocess: Preprocess

    def __call__(self, index: int) -> dict[str, Any]:
        return {"pixels": to_array(center_view(read_image(self.records[index])[0], self.preprocess))}


def normalised_views(
    records: Sequence[ImageRecord], preprocess: Preprocess, batch_size: int, workers: int, device: str
) -> Iterator[Tensor]:
    """Yields what a model sees of `records`, in order: float32 (B, 3, S, S) on `device`, normalised.

    Raises DataError for an image that cannot be read.
    """
    normalise = Normalise(preprocess.mean, preprocess.std, device)
    count = len(records)
    indices = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    for batch in batches(OneByOne(_CenterViews(records, preprocess)), indices, workers):
        yield normalise(batch["pixels"])


@torch.no_grad()
def embed(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) -> pooled features (B, dim) and those of the patches (B, N, dim), in full float32."""
    # cuDNN would otherwise round float32 to TF32.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        rows = model.forward_features(images)
    return model.forward_head(rows, pre_logits=True), rows[:, 1:]


def pooled_features(weights: Weights, device: str) -> Callable[[Tensor], Tensor]:
    model = weights.vit().to(device)
    return lambda shown: embed(model, shown)[0]


def fresh_weights(weights: Weights) -> Weights:
    """The same model with the initial weights that its seed gives. The caller's random state stays as it is."""
    shape = replace(weights.shape, k=max(weights.shape.k, 1))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(weights.seed)  # torch.manual_seed would seed the GPUs as well
        tensors = MaPeT(shape).state_dict()
    return replace(weights, shape=shape, tensors=tensors)


@torch.no_grad()
def extract_features(
    sources: list[list[ImageRecord]],
    preprocess: Preprocess,
    functions: list[Callable[[Tensor], Tensor]],
    batch_size: int,
    workers: int,
    device: str,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[Tensor]]:
    """For each function, its features (n, dim) float32 on `device` of the training and of the validation images."""
    passes = []
    for records in sources:
        parts = []
        for shown in normalised_views(records, preprocess, batch_size, workers, device):
            parts.append([function(shown) for function in functions])
            advance(len(shown))
        passes.append([torch.cat(column) for column in zip(*parts, strict=True)])
    return [list(pair) for pair in zip(*passes, strict=True)]
