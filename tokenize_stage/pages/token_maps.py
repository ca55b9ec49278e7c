"""Draws token maps: a few images beside their tokens, similar codes in similar colours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...shared.errors import FingerprintMismatch
from ...shared.images.decode import read_image
from ...shared.images.views import CropBox, replay
from ...shared.sources.records import ImageRecord
from ...shared.storage.files import written_whole
from ...shared.tokens.codebook import Codebook
from ...shared.tokens.store import TokenStore

_SIDE, _GAP, _HEADER = 160, 10, 22
_BACKGROUND, _INK = (250, 250, 248), (40, 40, 44)


def code_colours(codebook: Codebook) -> NDArray[np.uint8]:
    """An RGB colour for each code, uint8 (K, 3): the ranks of the centroids' first three principal components."""
    centred = codebook.centroids - codebook.centroids.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    ranks = np.argsort(np.argsort(centred @ axes[:3].T, axis=0), axis=0)
    colours = 40 + 200 * ranks / max(len(ranks) - 1, 1)
    return np.pad(colours, ((0, 0), (0, 3 - colours.shape[1])), constant_values=128).astype(np.uint8)


def draw_token_maps(records: Sequence[ImageRecord], store: TokenStore, codebook: Codebook, out: Path) -> Path:
    """Writes a PNG to `out`: for each image, the crop of the first view and beside it the map of its tokens.

    Raises:
        DataError: an image cannot be read or has no tokens.
        FingerprintMismatch: the store was made with another codebook.
    """
    if codebook.fingerprint != store.fingerprint:
        raise FingerprintMismatch(
            f"{store.path} was made with codebook {store.fingerprint[:12]}, not {codebook.fingerprint[:12]}."
        )
    colours = code_colours(codebook)
    columns = min(4, len(records))
    rows = -(-len(records) // columns)
    cell = 2 * _SIDE + _GAP
    sheet = Image.new("RGB", (columns * (cell + 2 * _GAP) + _GAP, _HEADER + rows * (_SIDE + 2 * _GAP)), _BACKGROUND)
    title = f"K={codebook.k} codes, {store.grid[0]}x{store.grid[1]} tokens per image; similar codes, similar colours"
    ImageDraw.Draw(sheet).text((_GAP, 6), title, fill=_INK)
    for number, record in enumerate(records):
        left = _GAP + (number % columns) * (cell + 2 * _GAP)
        top = _HEADER + (number // columns) * (_SIDE + 2 * _GAP)
        crop, tokens = _pair(record, store, colours)
        sheet.paste(crop, (left, top))
        sheet.paste(tokens, (left + _SIDE + _GAP // 2, top))
    with written_whole(out) as partial:
        sheet.save(partial, format="PNG")
    return out


def _pair(record: ImageRecord, store: TokenStore, colours: np.ndarray) -> tuple[Image.Image, Image.Image]:
    rows, at = store.find(record.key)
    image, _ = read_image(record)
    crop = replay(image, CropBox(*rows.crops[at, 0]), bool(rows.flips[at, 0]), _SIDE)
    tokens = Image.fromarray(colours[rows.tokens[at, 0]]).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
    return crop, tokens
