"""Reading and decoding one image: bytes from its file, upright RGB of every format, errors that name it."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import DataError
from mapet.shared.images.decode import decode, read_image, upright_size
from mapet.shared.sources.records import read_bytes
from mapet.shared.sources.sources import read_records
from PIL import Image, ImageOps, features

ORIENTATION = 0x0112


def picture(seed: int = 0, width: int = 20, height: int = 12) -> Image.Image:
    """A smooth random image, which lossy codecs hardly change."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def largest_difference(image: Image.Image, expected: Image.Image) -> float:
    assert image.mode == "RGB"
    assert image.size == expected.size
    return np.abs(pixels(image) - pixels(expected.convert("RGB"))).max()


# Decoding


def test_rgb_png_decodes_to_its_own_pixels():
    assert largest_difference(decode(encoded(picture()), "x"), picture()) == 0


def test_grey_decodes_to_three_equal_channels():
    grey = picture().convert("L")
    assert largest_difference(decode(encoded(grey), "x"), grey) == 0


def test_palette_decodes_to_its_colours():
    palette = picture().quantize(16)
    assert largest_difference(decode(encoded(palette), "x"), palette) == 0


def test_palette_with_transparency_decodes_to_its_colours_without_alpha():
    palette = picture().quantize(16)
    data = encoded(palette, transparency=bytes([0, 128, *[255] * 14]))
    assert "transparency" in Image.open(io.BytesIO(data)).info
    assert largest_difference(decode(data, "x"), palette) == 0


def test_alpha_is_dropped_and_not_blended():
    colours = picture()
    transparent = colours.copy()
    transparent.putalpha(picture(1).convert("L"))
    assert largest_difference(decode(encoded(transparent), "x"), colours) == 0


def test_cmyk_jpeg_decodes_to_its_colours():
    data = encoded(picture().convert("CMYK"), "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert largest_difference(decode(data, "x"), picture()) < 16


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 20 * 12).astype(np.uint16).reshape(12, 20)
    image = decode(encoded(Image.fromarray(values)), "x")
    assert np.array_equal(pixels(image)[..., 0], values // 256)
    assert len(np.unique(pixels(image))) > 200


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, format: str):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(picture(), format, exif=exif)
    image = decode(data, "x")
    assert image.size == ((20, 12) if orientation < 5 else (12, 20))
    assert largest_difference(image, ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) == 0


def test_orientation_is_applied_even_if_the_rest_of_exif_is_invalid():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010E] = "a description"
    data = encoded(picture(), "JPEG", exif=exif)
    # The description's tag becomes that of the width: text instead of a number can be read but not written back.
    assert data.count(b"\x01\x0e\x00\x02") == 1
    broken = data.replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02")
    assert decode(broken, "x").size == (12, 20)


def test_webp_decodes_close_to_the_original():
    assert largest_difference(decode(encoded(picture(), "WEBP", lossless=True), "x"), picture()) == 0


def test_the_first_frame_of_an_animation_is_decoded():
    data = encoded(picture(0), "WEBP", save_all=True, append_images=[picture(1)], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert largest_difference(decode(data, "x"), picture(0)) == 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_an_error_that_names_it(format: str):
    data = encoded(picture(0, 200, 160), format)
    with pytest.raises(DataError, match="dog"):
        decode(data[: len(data) // 2], "dog")


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(picture(), "PPM")])
def test_an_unsupported_image_is_an_error_that_names_it(data: bytes):
    with pytest.raises(DataError, match="cat is not an image of a format that is read"):
        decode(data, "cat")


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header states `width` x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("read", [decode, upright_size])
def test_a_decompression_bomb_is_an_error_that_names_it(read):
    with pytest.raises(
        DataError, match=r"^dog is 60000x60000 pixels, more than 178,956,970; give a larger --max-pixels"
    ):
        read(bomb(60_000, 60_000), "dog")


@pytest.mark.parametrize("read", [decode, upright_size])
def test_the_most_pixels_can_be_chosen(read, monkeypatch: pytest.MonkeyPatch):
    data = encoded(picture(0, 20, 12), "PNG")
    with pytest.raises(DataError, match=r"^dog is 20x12 pixels, more than 239"):
        read(data, "dog", 239)
    monkeypatch.setattr("mapet.shared.images.decode.MOST_PIXELS", 100)  # as if 240 pixels were a huge scan
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match=r"^dog is 20x12 pixels, more than 100"):
        read(data, "dog")
    assert decode(data, "dog", 240).size == upright_size(data, "dog", 240) == (20, 12)
    assert Image.MAX_IMAGE_PIXELS == 50  # Pillow's own limit is that of the whole process


@pytest.mark.parametrize("format", ["BMP", "GIF", "TIFF", "JPEG2000", "AVIF"])
def test_other_formats_are_read_as_pillow_reads_them(format: str):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encoded(picture(), format)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(decode(data, "x")), expected)


def test_of_an_animation_the_first_frame_is_read():
    frames = [picture(seed) for seed in range(3)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(decode(data, "x")), np.asarray(frames[0]))


def test_pixels_whose_range_is_unknown_are_an_error_that_names_them():
    with pytest.raises(DataError, match=r"depth cannot be decoded \(its pixels are 32-bit floats"):
        decode(encoded(picture().convert("F"), "TIFF"), "depth")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_the_size_from_headers_is_that_of_the_upright_image(orientation: int | None, format: str):
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    data = encoded(picture(), format, exif=exif)
    assert upright_size(data, "x") == decode(data, "x").size


def test_exif_after_the_pixels_of_a_png_is_applied():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(picture(), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    behind = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert upright_size(behind, "x") == decode(behind, "x").size == (12, 20)


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(picture(), "PPM")])
def test_the_size_of_an_unsupported_image_is_an_error_that_names_it(data: bytes):
    with pytest.raises(DataError, match="cat is not an image of a format that is read"):
        upright_size(data, "cat")


@pytest.mark.parametrize("read", [decode, upright_size])
def test_images_that_pillow_warns_of_are_read_without_a_warning(read, recwarn: pytest.WarningsRecorder):
    exif = Image.Exif()
    exif[0x010E] = "a description"
    exif[ORIENTATION] = 1
    damaged = encoded(picture(), "JPEG", exif=exif).replace(
        b"\x01\x0e\x00\x02\x00\x00\x00", b"\x01\x0e\x00\x02\x00\xff\x00"
    )
    palette = encoded(picture().quantize(16), transparency=bytes([0, 128, *[255] * 14]))
    for data in (damaged, palette, encoded(Image.new("1", (12_000, 8_000)))):
        read(data, "x")
    assert [str(warning.message) for warning in recwarn] == []


EXIF = Image.Exif()
EXIF[ORIENTATION], EXIF[0x010E] = 6, "a description"
SOUND = [
    encoded(picture(), "JPEG", exif=EXIF),
    encoded(picture(), "WEBP", exif=EXIF),
    encoded(picture().quantize(8), "PNG", exif=EXIF),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SOUND), st.integers(0, 400), st.integers(0, 255), st.booleans())
def test_damaged_bytes_give_an_image_or_a_data_error(data: bytes, at: int, value: int, cut: bool):
    at = min(at, len(data) - 1)
    damaged = data[:at] + (b"" if cut else bytes([value]) + data[at + 1 :])
    try:
        assert decode(damaged, "x").mode == "RGB"
    except DataError as error:
        assert str(error).startswith("x ")  # noqa: PT017 - either outcome is right


# Reading


def test_an_undecodable_image_in_a_tar_is_an_error_that_names_tar_and_key(tmp_path: Path, write_tar):
    tar = write_tar(tmp_path / "x.tar", {"dir/bad.jpg": b"not a picture"})
    with pytest.raises(DataError, match=r"x\.tar: image 'dir/bad'"):
        read_image(read_records(tar)[0])


def test_a_tar_that_shrank_after_listing_is_an_error_that_names_it(tmp_path: Path, write_tar):
    tar = write_tar(tmp_path / "shrinking.tar", {f"{name}.png": encoded(picture(0, 60, 40)) for name in "abc"})
    records = read_records(tar)
    os.truncate(tar, records[1].offset + 10)
    assert read_bytes(records[0])
    for record in records[1:]:
        with pytest.raises(DataError, match=rf"shrinking\.tar ends inside the image of key '{record.key}'"):
            read_bytes(record)


def test_a_tar_that_vanished_after_listing_is_an_error_that_names_it(tmp_path: Path, write_tar):
    tar = write_tar(tmp_path / "vanishing.tar", {"a.png": encoded(picture())})
    (record,) = read_records(tar)
    tar.unlink()
    with pytest.raises(DataError, match=r"vanishing\.tar cannot be read"):
        read_bytes(record)


def test_a_tar_replaced_by_another_file_is_opened_again(tmp_path: Path, write_tar):
    tar = write_tar(tmp_path / "x.tar", {"a.png": encoded(picture(0))})
    read_image(read_records(tar)[0])
    os.replace(write_tar(tmp_path / "new.tar", {"a.png": encoded(picture(1))}), tar)
    image, _ = read_image(read_records(tar)[0])
    assert largest_difference(image, picture(1)) == 0
