"""Augmentation: timm's RandAugment and rectangles, as a pure function of (seed, epoch, key)."""

import random

import numpy as np
import pytest
import torch
from mapet.shared.errors import UsageError
from mapet.shared.randomness import generator
from mapet.train_stage.classification.augment import Augment, erased_box
from mapet.train_stage.settings import AugmentSettings, FinetuneSettings, resolve_finetuning
from mapet.train_stage.weights.weights import Input
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing


def settings(*overrides: str) -> FinetuneSettings:
    return resolve_finetuning(None, ["model.image_size=32", *overrides], 32, Input().to_json())


def pixels(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 40, 56), dtype=np.uint8))


def augmented(chosen: FinetuneSettings, epoch: int, key: str) -> torch.Tensor:
    return Augment(chosen)(pixels(), epoch, key, generator(chosen.train.seed, "augment", epoch, key))


def test_rectangles_are_timms():
    found = 0
    for seed in range(100):
        random.seed(seed)
        image = torch.ones(3, 32, 32)
        RandomErasing(probability=0.5, mode="const", device="cpu")(image)
        box = erased_box(0.5, 32, random.Random(seed))
        expected = torch.ones(3, 32, 32)
        if box is not None:
            top, left, height, width = box
            expected[:, top : top + height, left : left + width] = 0
            found += 1
        assert torch.equal(image, expected)
    assert 30 < found < 70


def test_a_sample_depends_on_seed_epoch_and_key_alone():
    chosen = settings()
    first = augmented(chosen, 3, "a/b")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert torch.equal(first, augmented(chosen, 3, "a/b"))
    others = [augmented(chosen, 4, "a/b"), augmented(chosen, 3, "a/c"), augmented(settings("train.seed=1"), 3, "a/b")]
    assert not any(torch.equal(first, other) for other in others)
    assert first.dtype == torch.uint8
    assert first.shape == (3, 32, 32)


def test_rand_augment_is_timms_of_that_name():
    still = ("augment.crop_scale=[1,1]", "augment.crop_ratio=[1,1]", "augment.flip=0", "augment.erasing=0")
    chosen = settings(*still)
    plain = augmented(settings(*still, "augment.rand_augment=null"), 0, "k")
    mean = tuple(min(255, round(255 * value)) for value in chosen.data.mean)
    transform = rand_augment_transform(
        "rand-m9-mstd0.5", {"translate_const": 14, "img_mean": mean, "interpolation": Image.Resampling.BICUBIC}
    )
    drawn = generator(0, "augment", 0, "k")
    random.seed(int(drawn.integers(1 << 62)))
    np.random.seed(int(drawn.integers(1 << 32)))
    expected = np.asarray(transform(Image.fromarray(plain.permute(1, 2, 0).numpy()))).transpose(2, 0, 1)
    assert np.array_equal(augmented(chosen, 0, "k").numpy(), expected)
    assert not torch.equal(augmented(chosen, 0, "k"), plain)


def test_erased_pixels_are_noise_of_the_normalised_image():
    chosen = settings(
        "augment.rand_augment=null", "augment.erasing=1", "data.mean=[0.5,0.5,0.5]", "data.std=[0.1,0.1,0.1]"
    )
    plain = settings("augment.rand_augment=null", "augment.erasing=0")
    values = [
        (one[one != other].float() / 255 - 0.5) / 0.1
        for one, other in ((augmented(chosen, epoch, "k"), augmented(plain, epoch, "k")) for epoch in range(40))
    ]
    noise = torch.cat(values)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize("policy", ["augmix", "rand-x9", ""])
def test_an_unknown_policy_is_refused(policy: str):
    chosen = FinetuneSettings(augment=AugmentSettings(rand_augment=policy))
    chosen.model.image_size = 32
    with pytest.raises(UsageError, match=r"augment\.rand_augment"):
        Augment(chosen)
