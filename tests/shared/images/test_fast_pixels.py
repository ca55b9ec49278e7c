"""The student's pixels against Pillow's: equal JPEG pixels, equal crops, errors for the same images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import DataError
from mapet.shared.images.decode import decode
from mapet.shared.images.fast_pixels import decode_pixels, replay_pixels
from mapet.shared.images.views import CropBox, Preprocess, ViewPolicy, center_box, replay, to_array
from mapet.shared.sources.records import read_bytes as bytes_of
from mapet.shared.sources.sources import read_records
from PIL import Image

RESEARCH_DATA = Path(__file__).parents[4] / "shared" / "data"


def scene(seed: int, width: int, height: int) -> Image.Image:
    """A drawing that resembles a photograph: large shapes, edges, fine grain."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    y, x = np.mgrid[:height, :width]
    for _ in range(4):
        centre, radius = random.uniform(0, (height, width)), random.uniform(0.1, 0.4) * min(height, width)
        image[np.hypot(y - centre[0], x - centre[1]) < radius] = random.integers(0, 256, 3)
    return Image.fromarray((image + random.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def outcome(function, data: bytes) -> np.ndarray | str:
    try:
        pixels = function(data, "x: image 'k'")
    except DataError as error:
        return str(error)
    return np.asarray(pixels) if isinstance(pixels, Image.Image) else pixels.permute(1, 2, 0).numpy()


def same(data: bytes) -> bool:
    """Whether both decoders give the same pixels or raise the same error."""
    fast, reference = (outcome(function, data) for function in (decode_pixels, decode))
    return fast == reference if isinstance(reference, str) else np.array_equal(fast, reference)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PICTURE = scene(0, 97, 75)
KINDS = {
    "plain": encoded(PICTURE, quality=90),
    "progressive": encoded(PICTURE, progressive=True),
    "4:4:4": encoded(PICTURE, subsampling=0),
    "4:2:2": encoded(PICTURE, subsampling=1),
    "restarts": encoded(PICTURE, restart_marker_blocks=2),
    "grey": encoded(PICTURE.convert("L")),
    "CMYK": encoded(PICTURE.convert("CMYK")),
    "RGB inside": encoded(PICTURE, keep_rgb=True),
    "upright": encoded(PICTURE, exif=turned(1)),
    "turned": encoded(PICTURE, exif=turned(6)),
    "mirrored": encoded(PICTURE, exif=turned(2)),
    "PNG": encoded(PICTURE, "PNG"),
    "palette": encoded(PICTURE.quantize(16), "PNG"),
    "16 bit": encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100), "PNG"),
    "WebP": encoded(PICTURE, "WEBP"),
    "one pixel": encoded(PICTURE.crop((0, 0, 1, 1))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_decodes_to_pillows_pixels(kind: str):
    pixels = decode_pixels(KINDS[kind], "x")
    assert (pixels.dtype, pixels.shape[0]) == (torch.uint8, 3)
    assert same(KINDS[kind])


@pytest.mark.parametrize("kind", ["plain", "progressive", "restarts", "grey", "CMYK"])
def test_a_truncated_or_damaged_jpeg_is_an_error_exactly_when_it_is_for_pillow(kind: str):
    whole, random = KINDS[kind], np.random.default_rng(0)
    damaged = [whole[:size] for size in {*range(0, len(whole), 97), *range(len(whole) - 4, len(whole))}]
    for _ in range(60):
        data = bytearray(whole)
        for at in random.integers(0, len(whole), random.integers(1, 4)):
            data[at] = random.integers(256)
        damaged.append(bytes(data))
    damaged += [whole + b"more", whole[: len(whole) // 2] + bytes(500), whole[: len(whole) // 2] + b"\xff\xd9"]
    assert all(same(data) for data in damaged)
    refused = [data for data in damaged if isinstance(outcome(decode, data), str)]
    assert 10 < len(refused) < len(damaged)


def test_bytes_that_are_not_an_image_are_an_error_that_names_them():
    with pytest.raises(DataError, match="x: image 'k' is not an image of a format that is read"):
        decode_pixels(b"no image", "x: image 'k'")
    with pytest.raises(DataError, match=r"x: image 'k' cannot be decoded .*truncated"):
        decode_pixels(KINDS["plain"][:900], "x: image 'k'")


def apart(image: Image.Image, box: CropBox, flip: bool, size: int, filter: str) -> np.ndarray:
    """Differences of the fast replay from Pillow's, in grey levels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    shown = replay_pixels(pixels, box, flip, size, filter)
    assert (shown.dtype, shown.shape) == (torch.uint8, (3, size, size))
    return np.abs(shown.numpy().astype(int) - to_array(replay(image, box, flip, size, filter)))


SIDES, FILTERS = st.integers(40, 300), st.sampled_from(["bicubic", "bilinear"])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 99), SIDES, SIDES, st.sampled_from([32, 64, 100, 224]), FILTERS, st.booleans(), st.data())
def test_every_box_is_replayed_as_by_pillow(seed, width, height, size, filter, flip, data):
    """Any boxes, also fractional ones, of smooth images, where a shift by half a pixel would exceed the tolerance."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    h, w = data.draw(st.floats(8, height)), data.draw(st.floats(8, width))
    box = CropBox(data.draw(st.floats(0, height - h)), data.draw(st.floats(0, width - w)), h, w)
    difference = apart(image, box, flip, size, filter)
    # The steepest slope is 255 levels in a ninth of the image. Boxes are placed to 0.05 px; near an upper or left edge
    # on a whole pixel, the filter does not reach the two pixels beyond the box.
    steepest = 255 * 9 / min(width, height)
    assert difference.max() <= 4 + 0.6 * steepest
    near = int(2 * max(size / min(h, w), 1)) + 2
    assert difference[:, near:-near, near:-near].max(initial=0) <= 2 + 0.15 * steepest
    assert difference.mean() < 0.5 + 0.02 * steepest


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [64, 224])
def test_crops_of_scenes_differ_by_a_fraction_of_a_level(filter: str, size: int):
    policy = ViewPolicy("random-resized", 2)
    preprocess = Preprocess(448, "shortest", 448, "bicubic", (0, 0, 0), (1, 1, 1))
    means = []
    for seed in range(12):
        image = scene(seed, 300 + 17 * seed, 375 - 11 * seed)
        box, flip = policy.draw(str(seed), 0, *image.size)
        means.append(apart(image, box, flip, size, filter).mean())
        means.append(apart(image, center_box(preprocess, *image.size), False, size, filter).mean())
    assert np.mean(means) < 0.2
    assert max(means) < 0.7


@pytest.mark.skipif(not RESEARCH_DATA.is_dir(), reason="needs ../shared/data, which is not here")
def test_photographs_decode_equally_and_their_crops_differ_by_a_fraction_of_a_level():
    policy = ViewPolicy("random-resized", 2)
    preprocess = Preprocess(448, "shortest", 448, "bicubic", (0, 0, 0), (1, 1, 1))
    means, most = [], 0
    for record in read_records(RESEARCH_DATA / "photos-000000.tar")[:64]:
        data = bytes_of(record)
        assert same(data)
        image = decode(data, record.key)
        for box in (policy.draw(record.key, 0, *image.size)[0], center_box(preprocess, *image.size)):
            difference = apart(image, box, True, 224, "bicubic")
            means.append(difference.mean())
            most = max(most, difference.max())
    assert np.mean(means) < 0.1
    assert max(means) < 0.7
    assert most <= 80  # where an upper or left edge of the box falls on an edge in the image


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_changes_nothing(threads: int):
    pixels, box = decode_pixels(encoded(scene(1, 400, 300)), "x"), CropBox(3.7, 11.2, 250, 300.3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shown = replay_pixels(pixels, box, True, 224)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(shown, replay_pixels(pixels, box, True, 224))


def test_a_box_of_less_than_a_pixel_and_an_image_of_one_pixel():
    image = scene(2, 60, 50)
    for box in (CropBox(0, 0, 0.5, 0.5), CropBox(49.2, 59.1, 0.8, 0.9), CropBox(0, 0, 50, 60), CropBox(0, 0, 1, 60)):
        assert apart(image, box, False, 32, "bicubic").max() <= 12
    assert apart(image.crop((0, 0, 1, 1)), CropBox(0, 0, 1, 1), False, 16, "bicubic").max() == 0
