"""Masks are read as their values, whatever kind of one-channel PNG they are; what is no mask is refused."""

import struct
import zlib

import numpy as np
import pytest
from mapet.shared.errors import DataError, UsageError
from mapet.train_stage.masked.crops import nearest
from mapet.train_stage.masked.masks import IGNORED, MaskRule, read_mask
from PIL import Image

EVERYTHING = MaskRule(ignore=())


def raw_png(depth: int, width: int, row: bytes) -> bytes:
    """A grey PNG of one row, written after the specification (ISO/IEC 15948)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    ("depth", "row", "values"),
    [
        (1, b"\x50", [0, 1, 0, 1]),
        (2, b"\x1b", [0, 1, 2, 3]),
        (4, b"\x12\xcf", [1, 2, 12, 15]),
        (8, b"\x00\x03\x96\xff", [0, 3, 150, 255]),
        (16, b"\x00\x00\x00\x01\x01\x2c\x00\xff", [0, 1, 300, 255]),
    ],
)
def test_grey_values_of_every_depth_are_class_indices(record, depth: int, row: bytes, values: list[int]):
    assert read_mask(record(raw_png(depth, 4, row)), EVERYTHING).tolist() == [values]


def test_a_palette_gives_indices_and_not_colours(record, tmp_path):
    indices = np.array([[0, 7], [21, 255]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(tmp_path / "palette.png")
    assert image.mode == "P"
    assert read_mask(record((tmp_path / "palette.png").read_bytes()), EVERYTHING).tolist() == [[0, 7], [21, 255]]


def test_values_are_ignored_by_the_rule(record, png):
    data = png(np.array([[0, 1, 255]], np.uint8))
    assert read_mask(record(data), MaskRule()).tolist() == [[0, 1, IGNORED]]
    assert read_mask(record(data), MaskRule((0, 255))).tolist() == [[IGNORED, 1, IGNORED]]


def test_a_colour_image_is_no_mask(record, png):
    with pytest.raises(DataError, match="one channel"):
        read_mask(record(png(np.zeros((2, 2, 3), np.uint8))), MaskRule())


def test_a_jpeg_is_no_mask(record, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="JPEG"):
        read_mask(record((tmp_path / "a.jpg").read_bytes()), MaskRule())


def test_a_class_without_a_name_is_refused(record, png, tmp_path):
    (tmp_path / "names.txt").write_text("sky\nsea\n")
    rule = MaskRule.read((255,), tmp_path / "names.txt")
    assert read_mask(record(png(np.array([[0, 1]], np.uint8))), rule).tolist() == [[0, 1]]
    with pytest.raises(DataError, match=r"class index 2, and .*names\.txt names classes 0 to 1"):
        read_mask(record(png(np.array([[0, 2]], np.uint8))), rule)


def test_a_class_index_that_is_no_class_is_refused(record, png):
    with pytest.raises(DataError, match="more than 4,095"):
        read_mask(record(png(np.array([[1, 40_000]], np.uint16))), MaskRule())


def test_a_negative_value_cannot_be_ignored():
    with pytest.raises(UsageError, match="--ignore -1"):
        MaskRule((-1,))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (5, 9), (40, 13)])
def test_masks_are_resized_as_pillow_does_by_nearest_neighbour(height: int, width: int):
    mask = np.random.default_rng(0).integers(-1, 20, (23, 31)).astype(np.int16)
    expected = Image.fromarray(mask.astype(np.int32)).resize((width, height), Image.Resampling.NEAREST)
    assert np.array_equal(nearest(mask, height, width), np.asarray(expected))
