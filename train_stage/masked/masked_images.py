"""Images with their masks: KEY.jpg and KEY.seg.png in tars, or folders `images` and `annotations` side by side."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...shared.errors import DataError, UsageError
from ...shared.images.decode import upright_size
from ...shared.runtime.console import say
from ...shared.runtime.loader import batches
from ...shared.sources.keys import EXTENSIONS
from ...shared.sources.options import SourceOptions
from ...shared.sources.passed import PassedOver
from ...shared.sources.records import ImageRecord, read_bytes
from ...shared.sources.sources import SourceShard, open_source, read_records
from .masks import HIGHEST, IGNORED, MaskRule, name_of_mask, read_mask

Source = str | Path | Sequence[str | Path]
IMAGES, ANNOTATIONS = "images", "annotations"
"""Folders side by side, of the same structure, as in ADE20K's scene parsing benchmark."""
_ANY_IMAGE = ",".join(EXTENSIONS)
_CHECKED_TOGETHER = 64


@dataclass(frozen=True)
class MaskedImage:
    """Where an image and its mask are; their key is the image's."""

    image: ImageRecord
    mask: ImageRecord


def masked_images(source: Source, options: SourceOptions, mask_field: str) -> list[MaskedImage]:
    """The images of a local source with their masks, in the source's order.

    Args:
        source: Tars whose samples hold an image and a mask, or folders: one named `images`, or in such a folder, or one
            that holds `images` and `annotations`.
        options: Where keys end, and which picture of a key is its image.
        mask_field: What follows the key in the name of a mask in a tar, such as seg.png.

    Raises:
        DataError for an image without a mask, and as `sources.read_records` does; UsageError for a folder without a
        folder of masks.
    """
    shards = open_source(_folders_of_images(source), options)
    if shards[0].is_tar:
        return _in_tars(source, shards, options, mask_field)
    roots = {record.key: Path(shard.root) for shard in shards for record in shard.files}
    masks = {root: _masks_of(root) for root in roots.values()}
    records = read_records(source, shards=shards)
    return [MaskedImage(one, _beside(one, roots[one.key], masks[roots[one.key]])) for one in records]


def _folders_of_images(source: Source) -> list[str | Path]:
    """The source, with the folder `images` instead of one that holds it beside `annotations`."""
    given = [source] if isinstance(source, str | Path) else list(source)
    both = [all(os.path.isdir(os.path.join(one, name)) for name in (IMAGES, ANNOTATIONS)) for one in given]
    return [Path(one, IMAGES) if has else one for one, has in zip(given, both, strict=True)]


def _masks_of(root: Path) -> Path:
    """The folder of masks of a folder of images: its path with `annotations` in place of `images`."""
    parts = root.absolute().parts
    if IMAGES in parts:
        at = len(parts) - 1 - parts[::-1].index(IMAGES)
        masks = Path(*parts[:at], ANNOTATIONS, *parts[at + 1 :])
        if masks.is_dir():
            return masks
        raise UsageError(f"{root} has its masks in {masks}, which is no folder; give a data set with both folders.")
    raise UsageError(
        f"{root} has no masks; give a folder {IMAGES}/ beside a folder {ANNOTATIONS}/ of PNG files with the same "
        "names, or tars with KEY.jpg and KEY.seg.png."
    )


def _beside(image: ImageRecord, root: Path, masks: Path) -> ImageRecord:
    path = masks / image.path.relative_to(root).with_suffix(".png")
    if not path.is_file():
        raise DataError(f"{image.path} has no mask; it would be {path}.")
    return replace(image, path=path, offset=0, length=path.stat().st_size, extension="png")


def _in_tars(
    source: Source, shards: Sequence[SourceShard], options: SourceOptions, mask_field: str
) -> list[MaskedImage]:
    field = options.image_field or _ANY_IMAGE
    images = _pictures(source, shards, field, "an image format" if field == _ANY_IMAGE else f"--image-field {field}")
    masks = _pictures(source, shards, mask_field, f"--mask-field {mask_field}")
    return [MaskedImage(record, masks[key]) for key, record in images.items()]


def _pictures(source: Source, shards: Sequence[SourceShard], field: str, said: str) -> dict[str, ImageRecord]:
    """The picture of every key whose name goes on with `field`, which a message calls `said`."""
    of_field = [replace(shard, options=replace(shard.options, image_field=field)) for shard in shards]
    try:
        return {record.key: record for record in read_records(source, shards=of_field, passed=PassedOver())}
    except DataError as error:
        raise DataError(str(error).replace(f"--image-field {field}", said)) from None


@dataclass(frozen=True)
class _Checked:
    """Counts the pixels of each class in some masks, and checks the masks against their images."""

    images: Sequence[MaskedImage]
    rule: MaskRule

    def __call__(self, indices: Sequence[int]) -> dict[str, Any]:
        counts, digests = np.zeros(HIGHEST + 1, np.int64), []
        for index in indices:
            mask = self._fitting(self.images[index])
            counts += np.bincount(mask[mask != IGNORED], minlength=len(counts))
            digests.append(hashlib.sha256(mask.tobytes()).hexdigest())
        return {"counts": counts, "digests": digests}

    def _fitting(self, pair: MaskedImage) -> NDArray[np.int16]:
        mask = read_mask(pair.mask, self.rule)
        size = upright_size(
            read_bytes(pair.image), f"{pair.image.path}: image {pair.image.key!r}", pair.image.max_pixels
        )
        name = name_of_mask(pair.mask)
        if mask.shape != size[::-1]:
            raise DataError(
                f"{name} has {mask.shape[1]}x{mask.shape[0]} pixels, and its image, upright, {size[0]}x{size[1]}; give "
                "masks of these images."
            )
        if (mask == IGNORED).all():
            ignored = " or ".join(map(str, self.rule.ignore))
            raise DataError(f"{name} has only ignored pixels ({ignored}); leave the image out, or ignore fewer values.")
        return mask


class CheckedMasks(NamedTuple):
    """What a pass over masks found."""

    pixels: NDArray[np.int64]
    """(`HIGHEST` + 1,): how many pixels each class has, by class index."""
    sha256: str
    """Hex digest of the class indices of each key's mask, independent of the order of the keys."""


def check_masks(
    images: Sequence[MaskedImage], rule: MaskRule, workers: int, advance: Callable[[int], Any]
) -> CheckedMasks:
    """Reads every mask.

    Raises DataError, which names the mask, as `read_mask` does, for one of another size than its upright image, and for
    one with only ignored pixels.
    """
    indices = [range(at, min(at + _CHECKED_TOGETHER, len(images))) for at in range(0, len(images), _CHECKED_TOGETHER)]
    counts, digests = np.zeros(HIGHEST + 1, np.int64), list[str]()
    for of_batch, batch in zip(indices, batches(_Checked(images, rule), indices, workers), strict=True):
        counts += np.asarray(batch["counts"])
        digests += batch["digests"]
        advance(len(of_batch))
    lines = sorted(f"{pair.image.key}\t{digest}" for pair, digest in zip(images, digests, strict=True))
    return CheckedMasks(counts, hashlib.sha256("\0".join(lines).encode()).hexdigest())


def refuse_other_classes(train: NDArray[np.int64], val: NDArray[np.int64], rule: MaskRule) -> None:
    """Says which classes of the validation masks are not in the training masks. Raises DataError if none of them is.

    Both are pixels by class index.
    """
    missing = np.flatnonzero((val > 0) & (train == 0)).tolist()
    if len(missing) == np.count_nonzero(val):
        raise DataError(
            f"No class of the validation masks ({_some(missing, rule)}) is one of the training masks "
            f"({_some(np.flatnonzero(train).tolist(), rule)}); give masks with the same classes."
        )
    if missing:
        say(
            f"{len(missing)} of the {np.count_nonzero(val)} classes of the validation masks are not in the training "
            f"masks ({_some(missing, rule)}); their pixels count as wrong."
        )


def _some(classes: list[int], rule: MaskRule) -> str:
    return ", ".join(map(rule.name_of, classes[:3])) + (" ..." if len(classes) > 3 else "")
