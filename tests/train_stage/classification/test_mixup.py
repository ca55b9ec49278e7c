"""Mixup and CutMix draw as timm does, and mix neighbours."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.mixup
import torch
from mapet.train_stage.classification.mixup import Mix, draw_mix, mix_from, mix_images, neighbours
from mapet.train_stage.settings import AugmentSettings
from mapet.train_stage.tasks.finetuning_loss import soft_cross_entropy
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy


def drawing_from(generator: np.random.Generator) -> SimpleNamespace:
    """What timm takes from NumPy, with draws of `generator`."""
    random = SimpleNamespace(
        rand=generator.random,
        beta=generator.beta,
        randint=lambda low, high, size=None: generator.integers(low, high, size=size),
    )
    return SimpleNamespace(random=random, sqrt=np.sqrt, clip=np.clip)


@pytest.mark.parametrize(
    ("mixup", "cutmix", "probability"), [(0.8, 1.0, 1.0), (0.2, 0, 0.5), (0, 1.0, 0.7), (0.8, 1.0, 0.3)]
)
def test_a_batch_is_mixed_as_timm_mixes_it(
    monkeypatch: pytest.MonkeyPatch, mixup: float, cutmix: float, probability: float
):
    augment = AugmentSettings(mixup=mixup, cutmix=cutmix, mix_probability=probability)
    images, labels, logits = torch.randn(2, 3, 24, 24), torch.tensor([2, 0]), torch.randn(2, 5)
    mixed = 0
    for seed in range(60):
        mix = mix_from(augment, 24, np.random.default_rng(seed))
        mixer = Mixup(mixup, cutmix, prob=probability, num_classes=5, label_smoothing=0.1)
        monkeypatch.setattr(timm.data.mixup, "np", drawing_from(np.random.default_rng(seed)))
        # In a batch of two the mirrored image is the neighbour.
        expected, targets = mixer(images.clone(), labels)
        assert torch.allclose(mix_images(images, mix), expected, atol=1e-6)
        shares = [(labels, mix.share), (neighbours(labels), 1 - mix.share)]
        assert soft_cross_entropy(logits, shares, 0.1) == pytest.approx(
            SoftTargetCrossEntropy()(logits, targets).item(), abs=1e-6
        )
        mixed += mix.share < 1
    assert 60 * probability * 0.5 < mixed <= 60


def test_neighbours_stay_neighbours_however_a_batch_is_divided():
    images = torch.randn(8, 3, 6, 6)
    for mix in (Mix(0.3), Mix(0.75, (1, 4, 2, 5))):
        parts = torch.cat([mix_images(part, mix) for part in images.split(2)])
        assert torch.equal(mix_images(images, mix), parts)


def test_what_a_step_mixes_depends_on_seed_and_step_alone():
    augment = AugmentSettings()
    drawn = [draw_mix(augment, 32, 0, step) for step in range(20)]
    assert drawn == [draw_mix(augment, 32, 0, step) for step in range(20)]
    assert len(set(drawn)) == 20
    assert drawn != [draw_mix(augment, 32, 1, step) for step in range(20)]
    assert draw_mix(AugmentSettings(mixup=0, cutmix=0), 32, 0, 0) == Mix()
