"""The page of a segmentation: figures, and images with their true and predicted classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...shared.images.decode import read_image
from ...shared.randomness import generator
from ...shared.report.pictures import data_uri, golden_colours, hex_colours, overlay_uri
from ...shared.report.render import write_page
from ..masked.crops import nearest
from ..masked.masked_images import MaskedImage
from ..masked.masks import MaskRule, read_mask
from .scores import Measured

SHOWN = 24
"""Images on a page."""
_LONGEST = 320
"""Longer side of an image on a page, in pixels."""


def shown_images(val: Sequence[MaskedImage]) -> list[MaskedImage]:
    """The images that a page shows, drawn by key, in their order."""
    drawn = sorted(val, key=lambda pair: (generator("segment", "page", pair.image.key).random(), pair.image.key))
    keys = {pair.image.key for pair in drawn[:SHOWN]}
    return [pair for pair in val if pair.image.key in keys]


def shown_keys(val: Sequence[MaskedImage]) -> set[str]:
    """The keys of the images that a page shows."""
    return {pair.image.key for pair in shown_images(val)}


def write(path: Path, weights: Path, measured: Sequence[Measured], val: Sequence[MaskedImage], rule: MaskRule) -> Path:
    """Writes the page as one self-contained HTML file. Raises DataError if it cannot be written."""
    colours = golden_colours(len(measured[0].scores.iou))
    images = shown_images(val)
    on_page = {int(index) for row in measured for one in row.maps.values() for index in np.unique(one)}
    known = [index for index, iou in enumerate(measured[0].scores.iou) if iou is not None or index in on_page]
    data = {
        "name": weights.absolute().name,
        "weights": str(weights),
        "val_images": len(val),
        "rows": [
            {
                "features": row.features,
                "classifier": row.classifier,
                "mean_iou": row.scores.mean_iou,
                "pixel_accuracy": row.scores.pixel_accuracy,
            }
            for row in measured
        ],
        "classes": [
            {
                "name": rule.name_of(index),
                "colour": hex_colours(colours[index : index + 1]),
                "iou": [row.scores.iou[index] for row in measured],
            }
            for index in known
        ],
    }
    pictures = [_shown(pair, measured, rule, colours) for pair in images]
    title = f"{weights.absolute().name}: mapet segmentation"
    return write_page(path, "segmentation", title=title, data=data, images=pictures)


def _shown(
    pair: MaskedImage, measured: Sequence[Measured], rule: MaskRule, colours: NDArray[np.uint8]
) -> dict[str, Any]:
    image = read_image(pair.image)[0]
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    maps = [read_mask(pair.mask, rule), *(row.maps[pair.image.key] for row in measured)]
    # In the pixels of the image on the page; what was measured on a squashed image gets its aspect ratio back.
    truth, *predicted = (overlay_uri(nearest(one, image.height, image.width), colours) for one in maps)
    return {
        "key": pair.image.key,
        "width": image.width,
        "height": image.height,
        "photo": data_uri(image),
        "truth": truth,
        "maps": predicted,
    }
