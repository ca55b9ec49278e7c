"""Views: the centre view equals the library's preprocessing, its box covers the same pixels, and replay shows them."""

import numpy as np
import open_clip
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import UsageError
from mapet.shared.images.views import (
    CropBox,
    Preprocess,
    ViewPolicy,
    center_box,
    center_view,
    replay,
    show_view,
    to_array,
    view_of_epoch,
)
from mapet.tokenize_stage.towers.opening import open_tower
from mapet.tokenize_stage.towers.tower import TowerSettings
from PIL import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIDES = st.integers(1, 150)
SEEDS = st.integers(0, 2**32 - 1)


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(seed: int, width: int, height: int) -> Image.Image:
    """Low frequencies only, so that the same pixels at two resolutions are comparable."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def preprocess_of(
    resize: str = "shortest", size: int = 32, resize_size: int = 32, filter: str = "bicubic"
) -> Preprocess:
    return Preprocess(size, resize, resize_size, filter, MEAN, STD)


def normalised(image: Image.Image, preprocess: Preprocess) -> torch.Tensor:
    """A tower's input for the pixels, in torchvision's arithmetic."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (torch.tensor(to_array(center_view(image, preprocess))).float() / 255 - mean) / std


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@settings(max_examples=60, deadline=None)
@given(width=SIDES, height=SIDES, seed=SEEDS, size=st.sampled_from([1, 16, 31, 32]))
def test_center_view_equals_open_clips_preprocessing(
    resize: str, filter: str, width: int, height: int, seed: int, size: int
):
    reference = open_clip.image_transform(
        size, is_train=False, mean=MEAN, std=STD, resize_mode=resize, interpolation=filter
    )
    image, preprocess = noise(seed, width, height), preprocess_of(resize, size, size, filter)
    assert torch.equal(normalised(image, preprocess), reference(image))


@pytest.fixture(scope="module")
def timm_view() -> tuple[Preprocess, object]:
    """For a model with crop_pct 0.95: the Preprocess of its tower, and timm's transform."""
    name = "test_efficientnet"
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    assert config["crop_pct"] == 0.95
    preprocess = open_tower(TowerSettings(f"timm:{name}", "none")).preprocess
    return preprocess, timm.data.create_transform(**config, is_training=False)


@settings(max_examples=40, deadline=None)
@given(width=SIDES, height=SIDES, seed=SEEDS)
def test_center_view_equals_timms_preprocessing(timm_view, width: int, height: int, seed: int):
    preprocess, reference = timm_view
    image = noise(seed, width, height)
    assert torch.equal(normalised(image, preprocess), reference(image))


def test_preprocess_survives_json():
    preprocess = preprocess_of("squash", 224, 256, "bilinear")
    assert Preprocess.from_json(preprocess.to_json()) == preprocess


PREPROCESSES = st.builds(
    lambda resize, size, more: preprocess_of(resize, size, size + more),
    st.sampled_from(["shortest", "squash"]),
    st.integers(1, 300),
    st.integers(0, 40),
)


@settings(max_examples=500, deadline=None)
@given(PREPROCESSES, st.integers(1, 5000), st.integers(1, 5000))
def test_center_box_lies_inside_the_image_and_has_the_views_shape(preprocess: Preprocess, width: int, height: int):
    box = center_box(preprocess, width, height)
    assert min(box.top, box.left) >= -1e-6
    assert box.top + box.height <= height + 1e-6
    assert box.left + box.width <= width + 1e-6
    if preprocess.resize == "squash":
        assert box.height / height == pytest.approx(box.width / width)
    else:
        # Square except for the rounding of the longer side to whole pixels.
        longer = preprocess.resize_size * max(width, height) / min(width, height)
        ratio = max(box.height / box.width, box.width / box.height)
        assert ratio * (longer - 1) <= longer * (1 + 1e-9)


@pytest.mark.parametrize(
    ("preprocess", "width", "height", "expected"),
    [
        (preprocess_of("shortest", 32, 32), 64, 96, (16, 0, 64, 64)),
        (preprocess_of("shortest", 32, 32), 96, 64, (0, 16, 64, 64)),
        (preprocess_of("shortest", 32, 40), 40, 80, (24, 4, 32, 32)),
        (preprocess_of("squash", 32, 32), 96, 64, (0, 0, 64, 96)),
        (preprocess_of("squash", 32, 64), 128, 64, (16, 32, 32, 64)),
    ],
)
def test_center_box_of_known_cases(preprocess: Preprocess, width: int, height: int, expected: tuple):
    assert center_box(preprocess, width, height) == pytest.approx(expected)


IMAGES = st.builds(smooth, SEEDS, st.integers(80, 220), st.integers(80, 220))
SMALL = st.sampled_from(
    [preprocess_of("shortest", 32, 32), preprocess_of("shortest", 56, 64), preprocess_of("squash", 48, 48)]
)


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))


@settings(max_examples=100, deadline=None)
@given(IMAGES, SMALL)
def test_replay_at_the_towers_size_is_the_center_view(image: Image.Image, preprocess: Preprocess):
    box = center_box(preprocess, *image.size)
    again = replay(image, box, False, preprocess.image_size)
    # At the border of the box the two filters have different neighbours.
    inner = difference(again, center_view(image, preprocess))[3:-3, 3:-3]
    assert (inner <= 1).mean() > 0.99
    assert inner.max() <= 3


def distance(image: Image.Image, reference: Image.Image) -> float:
    """Mean difference in grey levels after reducing both to one small size."""
    small = (16, 16)
    return difference(
        image.resize(small, Image.Resampling.BICUBIC), reference.resize(small, Image.Resampling.BICUBIC)
    ).mean()


@settings(max_examples=60, deadline=None)
@given(IMAGES, SMALL, st.sampled_from([48, 64, 96, 112, 160]))
def test_replay_at_another_resolution_shows_the_same_pixels(image: Image.Image, preprocess: Preprocess, size: int):
    view, box = center_view(image, preprocess), center_box(preprocess, *image.size)
    same = distance(replay(image, box, False, size), view)
    assert same < 0.6
    patch = box.height / 8, box.width / 8
    for down, right in ((1, 0), (0, 1), (-1, 0), (0, -1)):
        top = min(max(box.top + down * patch[0], 0), image.height - box.height)
        left = min(max(box.left + right * patch[1], 0), image.width - box.width)
        if abs(top - box.top) + abs(left - box.left) > 0.99 * min(patch):
            shifted = replay(image, CropBox(top, left, box.height, box.width), False, size)
            assert distance(shifted, view) > 5
    assert distance(replay(image, box, True, size), view) > 5


@settings(max_examples=30, deadline=None)
@given(IMAGES, st.sampled_from([16, 33]))
def test_a_flip_mirrors_the_crop_left_to_right(image: Image.Image, size: int):
    box = CropBox(3.25, 4.5, 20.0, 30.75)
    plain, flipped = (np.asarray(replay(image, box, flip, size)) for flip in (False, True))
    assert np.array_equal(flipped, plain[:, ::-1])
    assert not np.array_equal(flipped, plain)


def test_replay_of_whole_pixels_at_their_own_size_is_a_crop():
    image = noise(0, 50, 40)
    assert not difference(replay(image, CropBox(5, 7, 24, 24), False, 24), image.crop((7, 5, 31, 29))).any()


def test_to_array_is_channels_first():
    image = noise(0, 5, 3)
    array = to_array(image)
    assert (array.shape, array.dtype) == ((3, 3, 5), np.uint8)
    assert array[:, 2, 4].tolist() == list(image.getpixel((4, 2)))
    assert array.flags.c_contiguous


# View policies


POLICIES = st.builds(
    lambda low, high, ratio, flip, seed: ViewPolicy(
        "random-resized", 6, (min(low, high), max(low, high)), (1 / ratio, ratio), flip, seed=seed
    ),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.floats(1, 3),
    st.floats(0, 1),
    st.integers(0, 99),
)


@settings(max_examples=200, deadline=None)
@given(policy=POLICIES, key=st.text(), view=st.integers(0, 5), width=st.integers(1, 600), height=st.integers(1, 600))
def test_a_drawn_box_is_inside_the_image_and_has_the_requested_shape(
    policy: ViewPolicy, key: str, view: int, width: int, height: int
):
    box, flip = policy.draw(key, view, width, height)
    assert (box, flip) == policy.draw(key, view, width, height)
    assert min(box.top, box.left) >= 0
    assert min(box.height, box.width) >= 1
    assert box.top + box.height <= height
    assert box.left + box.width <= width
    if min(width, height) >= 40 and 1 / 2 < width / height < 2 and policy.scale[1] < 0.4:
        # Any such box fits, so it differs from the requested shape only by rounding to whole pixels.
        rounding = 1 + 2 / min(box.height, box.width)
        assert policy.scale[0] / rounding <= box.height * box.width / (width * height) <= policy.scale[1] * rounding
        assert policy.ratio[0] / rounding <= box.width / box.height <= policy.ratio[1] * rounding


def test_boxes_and_flips_are_distributed_as_in_torchvision():
    policy = ViewPolicy("random-resized", 4000, (0.2, 1.0), (0.75, 4 / 3), 0.3)
    drawn = [policy.draw("a key", view, 300, 200) for view in range(policy.views)]
    boxes = np.array([box for box, _ in drawn])
    image = torch.zeros(1, 200, 300)
    torch.manual_seed(0)
    reference = np.array(
        [torchvision.transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [0.75, 4 / 3]) for _ in range(4000)]
    )
    shares = np.linspace(0.05, 0.95, 19)
    for column, side in enumerate((200, 300, 200, 300)):  # top, left, height, width
        assert np.allclose(
            np.quantile(boxes[:, column], shares), np.quantile(reference[:, column], shares), atol=0.03 * side
        )
    assert np.mean([flip for _, flip in drawn]) == pytest.approx(0.3, abs=0.03)


def test_views_differ_between_numbers_keys_and_seeds_and_do_not_depend_on_how_many_there_are():
    policy = ViewPolicy("random-resized", 4)
    boxes = {policy.draw(key, view, 99, 77) for key in ("a", "b") for view in range(4)}
    assert len(boxes) == 8
    assert ViewPolicy("random-resized", 4, seed=1).draw("a", 0, 99, 77) not in boxes
    assert ViewPolicy("random-resized", 9, with_center=True).draw("a", 3, 99, 77) == policy.draw("a", 3, 99, 77)


@pytest.mark.parametrize(("width", "height"), [(500, 1), (1, 500), (400, 20), (1, 1)])
def test_an_image_too_narrow_for_any_box_is_cropped_at_its_centre(width: int, height: int):
    policy = ViewPolicy("random-resized", 2, (0.9, 1.0), (1.0, 1.0))
    box, _ = policy.draw("k", 0, width, height)
    side = min(width, height)
    assert (box.height, box.width) == (side, side)
    assert (box.top, box.left) == ((height - side) // 2, (width - side) // 2)


def test_show_view_equals_the_replayed_box_and_the_centre_view():
    preprocess, image = preprocess_of(), smooth(3, 90, 60)
    policy = ViewPolicy("random-resized", 3, flip=1.0, with_center=True)
    centre, box, flip = show_view(image, policy, "k", 0, preprocess)
    assert np.array_equal(to_array(centre), to_array(center_view(image, preprocess)))
    assert (box, flip) == (center_box(preprocess, 90, 60), False)
    view, box, flip = show_view(image, policy, "k", 2, preprocess)
    assert flip
    assert np.array_equal(to_array(view), to_array(replay(image, box, True, 32)))
    assert np.array_equal(to_array(view)[:, :, ::-1], to_array(replay(image, box, False, 32)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 5), st.text(), st.integers(0, 4))
def test_each_view_is_used_once_before_any_is_used_again(views: int, seed: int, key: str, cycle: int):
    seen = [view_of_epoch(views, seed, epoch, key) for epoch in range(cycle * views, (cycle + 1) * views)]
    assert sorted(seen) == list(range(views))


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"crop": "corner"}, "--crop corner"),
        ({"views": 0}, "--views 0"),
        ({"views": 2}, "--views 2 with --crop center"),
        ({"with_center": True}, "--crop center"),
        ({"scale": (0.0, 1.0)}, r"--scale 0\.0"),
        ({"scale": (0.5, 0.4)}, "--scale"),
        ({"scale": (0.5, 1.4)}, "--scale"),
        ({"ratio": (2.0, 1.0)}, "--ratio"),
        ({"ratio": (0.0, 1.0)}, "--ratio"),
        ({"flip": 1.5}, r"--flip 1\.5"),
        ({"scale": (float("nan"), 1.0)}, "--scale"),
    ],
)
def test_invalid_policies_are_usage_errors_that_name_the_option(fields: dict, option: str):
    with pytest.raises(UsageError, match=option):
        ViewPolicy(**fields)
