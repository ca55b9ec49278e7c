"""Frozen features of patches, each with the class of its every pixel."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...shared.errors import DataError, UsageError
from ...shared.images.decode import read_image
from ...shared.images.normalise import Normalise
from ...shared.images.views import Preprocess, center_view, to_array
from ...shared.randomness import generator
from ...shared.runtime.loader import OneByOne, batches
from ..evaluation.embed import Execution, embed, refuse_not_finite
from ..evaluation.held_out import HELD_OUT
from ..masked.crops import nearest
from ..masked.masked_images import MaskedImage
from ..masked.masks import IGNORED, MaskRule, read_mask
from ..weights.weights import Weights

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

_MOST_COUNTS = 1 << 24
"""How many counts of classes are in memory at once."""


@dataclass(frozen=True)
class PatchEncoder:
    """A frozen ViT whose features of patches are measured."""

    name: str
    """Such as "pre-trained"."""
    model: "VisionTransformer"
    feature: str
    """What the vector of a patch is, in words."""

    @classmethod
    def of(cls, name: str, weights: Weights, device: str) -> "PatchEncoder":
        # A fine-tuned model has no final norm: its own follows the mean over patches.
        feature = "last block's" if weights.kind == "classifier" else "final norm's"
        return cls(name, weights.vit().to(device), f"patches of the {feature} output")


@dataclass(frozen=True)
class SquashedImages:
    """Images and masks resized to the model's square input, whatever their aspect ratio (as CAPI does)."""

    images: Sequence[MaskedImage]
    rule: MaskRule
    preprocess: Preprocess
    patch_size: int

    @classmethod
    def of(cls, images: Sequence[MaskedImage], rule: MaskRule, weights: Weights) -> "SquashedImages":
        size = weights.preprocess.image_size
        preprocess = replace(weights.preprocess, resize="squash", resize_size=size)
        return cls(images, rule, preprocess, weights.shape.patch_size)

    def __call__(self, index: int) -> dict[str, Any]:
        """`pixels` (3, S, S) uint8, and `blocks` (N, p * p) int16: the classes of each patch's pixels."""
        pair, size, side = self.images[index], self.preprocess.image_size, self.patch_size
        image = center_view(read_image(pair.image)[0], self.preprocess)
        mask = nearest(read_mask(pair.mask, self.rule), size, size)
        grid = size // side
        blocks = mask.reshape(grid, side, grid, side).transpose(0, 2, 1, 3)
        return {"pixels": to_array(image), "blocks": np.ascontiguousarray(blocks.reshape(grid * grid, side * side))}

    def batches(self, execution: Execution) -> Iterator[tuple[Sequence[MaskedImage], Tensor, Tensor]]:
        """Yields images, their normalised pixels (B, 3, S, S) float32 and their blocks (B, N, p * p) int16.

        Raises DataError for an image or a mask that cannot be read.
        """
        normalise = Normalise(self.preprocess.mean, self.preprocess.std, execution.device)
        count, step = len(self.images), execution.batch_size
        indices = [range(start, min(start + step, count)) for start in range(0, count, step)]
        for of_batch, batch in zip(indices, batches(OneByOne(self), indices, execution.workers), strict=True):
            yield self.images[of_batch.start : of_batch.stop], normalise(batch["pixels"]), batch["blocks"]
            execution.advance(len(of_batch))


def encode(encoder: PatchEncoder, images: Sequence[MaskedImage], pixels: Tensor) -> Tensor:
    """Features (B, N, dim) float32 of the patches of normalised pixels (B, 3, S, S).

    Raises DataError, which names the image, if they hold NaN or infinity.
    """
    features = embed(encoder.model, pixels)[1]
    refuse_not_finite(features, [pair.image for pair in images], f"patch features of {encoder.name}")
    return features


@dataclass(frozen=True, eq=False)
class PatchSet:
    """Patches of training images, those without a labelled pixel left out."""

    features: Tensor
    """(n, dim) float32."""
    blocks: Tensor
    """(n, p * p) int16: the class of each pixel, or `IGNORED`."""
    labels: Tensor
    """(n,) int64: the most frequent class of the pixels."""
    held_out: Tensor
    """(n,) bool: whether the patch is of an image that choices are made on."""
    classes: int
    """The number of classes; every class index is lower."""
    protocol: dict[str, Any]
    """How the patches were drawn, as JSON values."""

    def only(self, chosen: Tensor) -> "PatchSet":
        """The patches at which `chosen` (n,) bool is true."""
        parts = {name: getattr(self, name)[chosen] for name in ("features", "blocks", "labels", "held_out")}
        return replace(self, **parts)


@dataclass(frozen=True)
class _Draw:
    """Which patches of training images are kept, and which of the images choices are made on."""

    each: int
    """Patches of an image that are kept."""
    whole: int
    """Patches of an image."""
    held_out: set[str]
    """Keys."""

    @classmethod
    def of(cls, squashed: SquashedImages, most: int) -> "_Draw":
        count, whole = len(squashed.images), (squashed.preprocess.image_size // squashed.patch_size) ** 2
        if count < 2:
            raise UsageError("--images has 1 image; it needs two or more, as one in ten is held out for choices.")
        if most < count:
            raise UsageError(f"--max-patches {most:,} is fewer than the {count:,} training images; give more.")
        return cls(min(whole, most // count), whole, held_out_keys([pair.image.key for pair in squashed.images]))

    def patches(self, keys: Sequence[str]) -> Tensor:
        """(B, each) int64: the patches of these images that are kept, ascending."""
        drawn = [generator("segment", "patches", key).permutation(self.whole)[: self.each] for key in keys]
        return torch.from_numpy(np.sort(np.stack(drawn)))

    def describe(self) -> str:
        return "all" if self.each == self.whole else f"{self.each} of {self.whole} of each training image, drawn by key"


def patch_sets(
    encoders: Sequence[PatchEncoder], squashed: SquashedImages, classes: int, most: int, execution: Execution
) -> list[PatchSet]:
    """The patches of training images under each encoder, at most `most` of them, in one pass over the images.

    If there are more, each image gives the same number of patches, drawn by its key. A tenth of the images, drawn by
    key, is held out for choices.

    Raises DataError for an image or a mask that cannot be read, UsageError for fewer patches than images or for a
    single image.
    """
    draw, device = _Draw.of(squashed, most), execution.device
    features: list[list[Tensor]] = [[] for _ in encoders]
    blocks: list[Tensor] = []
    held_out: list[Tensor] = []
    for images, pixels, all_blocks in squashed.batches(execution):
        keys = [pair.image.key for pair in images]
        chosen = draw.patches(keys)[..., None]
        drawn = torch.take_along_dim(all_blocks, chosen, dim=1)
        labelled = (drawn != IGNORED).any(-1)
        blocks.append(drawn[labelled])
        held_out.append(torch.tensor([key in draw.held_out for key in keys])[:, None].expand_as(labelled)[labelled])
        for part, encoder in zip(features, encoders, strict=True):
            encoded = encode(encoder, images, pixels)
            part.append(torch.take_along_dim(encoded, chosen.to(device), dim=1)[labelled.to(device)])
    all_drawn, held = torch.cat(blocks).to(device), torch.cat(held_out).to(device)
    labels, protocol = most_frequent(all_drawn, classes), _protocol(squashed, draw, len(all_drawn))
    _refuse_one_sided(held)
    return [
        PatchSet(torch.cat(part), all_drawn, labels, held, classes, {"feature": encoder.feature, **protocol})
        for encoder, part in zip(encoders, features, strict=True)
    ]


def _refuse_one_sided(held_out: Tensor) -> None:
    if held_out.all() or not held_out.any():
        where = "held-out tenth" if not held_out.any() else "other"
        raise DataError(f"No patch of the {where} of the training images has a labelled pixel; give more images.")


def _protocol(squashed: SquashedImages, draw: _Draw, count: int) -> dict[str, Any]:
    size = squashed.preprocess.image_size
    return {
        "input": f"image squashed to {size}x{size}, its mask by nearest neighbour; measured at this size",
        "scaling": "features standardised by the training patches",
        "preprocess": squashed.preprocess.to_json(),
        "train_images": len(squashed.images),
        "train_patches": count,
        "patches": draw.describe(),
        "hyper_parameters": f"chosen by mean IoU on the patches of {len(draw.held_out):,} of the training images "
        f"({HELD_OUT:.0%}, drawn by key), then refitted on all of them",
    }


def held_out_keys(keys: Sequence[str]) -> set[str]:
    """A tenth of the keys, at least one, drawn by key."""
    ordered = sorted(keys, key=lambda key: (generator("segment", "held out", key).random(), key))
    return set(ordered[: max(1, int(len(keys) * HELD_OUT))])


def most_frequent(values: Tensor, classes: int) -> Tensor:
    """(...,) int64: the most frequent class along the last dimension of class indices (..., j), the lowest of several;
    `IGNORED` does not count, and is the result where there is nothing else."""
    rows = values.reshape(-1, values.shape[-1])
    found = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    step = max(1, _MOST_COUNTS // (classes + 1))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].long()
        known = part != IGNORED
        counts = torch.zeros(len(part), classes, dtype=torch.int32, device=rows.device)
        counts.scatter_add_(1, part.clamp(min=0), known.int())
        found[start : start + step] = torch.where(known.any(1), counts.argmax(1), IGNORED)
    return found.view(values.shape[:-1])
