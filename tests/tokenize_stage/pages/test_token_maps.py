"""The picture of token maps: one cell an image, equal tokens in equal colours, similar codes in similar ones."""

from pathlib import Path

import numpy as np
import pytest
from mapet.shared.errors import DataError, FingerprintMismatch
from mapet.shared.images.decode import read_image
from mapet.shared.sources.records import ImageRecord
from mapet.shared.sources.sources import read_records
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.pages.token_maps import code_colours, draw_token_maps
from PIL import Image

SIDE = 160


def records_of(chain, count: int) -> list[ImageRecord]:
    return read_records(chain.images)[:count]


def book_of(k: int, dim: int) -> Codebook:
    centroids = np.random.default_rng(0).normal(size=(k, dim)).astype(np.float32)
    return Codebook(centroids, np.ones(k, dtype=np.int64), {})


def block_at(sheet: np.ndarray, inside: np.ndarray) -> tuple[int, int]:
    """Top and left of where the picture `inside` lies in the sheet, pixel for pixel."""
    height, width = inside.shape[:2]
    for top, left in np.argwhere((sheet == inside[0, 0]).all(-1)):
        if np.array_equal(sheet[top : top + height, left : left + width], inside):
            return int(top), int(left)
    raise AssertionError("the picture is not in the sheet")


@pytest.mark.parametrize("count", [1, 4, 6])
def test_every_image_has_a_cell_with_its_crop_and_its_token_map(chain, tmp_path: Path, count: int):
    store, book, records = TokenStore(chain.tokens), Codebook.load(chain.codebook), records_of(chain, count)
    path = draw_token_maps(records, store, book, tmp_path / "deep" / "maps.png")
    assert path == tmp_path / "deep" / "maps.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        sheet = np.asarray(image.convert("RGB"))
    colours, places = code_colours(book), []
    for record in records:
        rows, at = store.find(record.key)
        token_map = np.repeat(np.repeat(colours[rows.tokens[at, 0]], SIDE // 8, axis=0), SIDE // 8, axis=1)
        top, left = block_at(sheet, token_map)
        places.append((top, left))
        crop = sheet[top : top + SIDE, left - SIDE - 5 : left - 5]
        whole = np.asarray(read_image(record)[0].resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        assert np.array_equal(crop, whole)
    assert len(set(places)) == count
    # Read like text: left to right, then down.
    assert places == sorted(places)


def test_every_code_has_a_colour_of_its_own_that_is_neither_black_nor_white(chain):
    colours = code_colours(Codebook.load(chain.codebook))
    assert (colours.shape, colours.dtype) == ((16, 3), np.uint8)
    assert len({tuple(colour) for colour in colours.tolist()}) == 16
    assert colours.min() >= 40
    assert colours.max() <= 240


def test_similar_codes_have_similar_colours():
    book = book_of(40, 3)
    twin = Codebook(np.concatenate([book.centroids, book.centroids + 1e-3]), np.ones(80), {})
    colours = code_colours(twin).astype(int)
    assert np.abs(colours[:40] - colours[40:]).mean() < np.abs(colours[:40] - colours[39::-1]).mean() / 4


@pytest.mark.parametrize(("k", "dim"), [(2, 5), (5, 1), (5, 2), (300, 64)])
def test_any_size_of_codebook_has_colours(k: int, dim: int):
    colours = code_colours(book_of(k, dim))
    assert colours.shape == (k, 3)
    assert len({tuple(colour) for colour in colours.tolist()}) > min(k, 200) * 0.9


def test_another_codebook_is_a_mismatch(chain, tower: str, tmp_path: Path):
    other = build_codebook(chain.images, tmp_path / "other", tower=tower, k=9, iterations=2, restarts=1)
    with pytest.raises(FingerprintMismatch, match=other.fingerprint[:12]):
        draw_token_maps(records_of(chain, 1), TokenStore(chain.tokens), other, tmp_path / "maps.png")
    assert not (tmp_path / "maps.png").exists()


def test_an_image_without_tokens_is_a_data_error(chain, tmp_path: Path):
    foreign = ImageRecord("foreign", chain.tars[0], 0, 1, None)
    with pytest.raises(DataError, match="no image with key 'foreign'"):
        draw_token_maps([foreign], TokenStore(chain.tokens), Codebook.load(chain.codebook), tmp_path / "maps.png")
