"""Frozen features that tests make up."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from mapet.shared.images.views import Preprocess
from mapet.train_stage.evaluation.embed import FrozenFeatures
from mapet.train_stage.evaluation.patch_features import PatchFeatures
from torch import Tensor

PREPROCESS = Preprocess(8, "shortest", 8, "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def as_features(patches: Tensor, labels: Tensor, train: int) -> FrozenFeatures:
    """Patch features (n, N, dim) and labels (n,), the first `train` images to train on; pooled by the mean."""
    halves = (patches[:train], patches[train:])
    stored = [PatchFeatures(half.numpy().astype(np.float16)) for half in halves]
    pooled = [half.mean(1) for half in halves]
    keys = tuple(f"image-{number:04d}" for number in range(train))
    return FrozenFeatures(
        "made up", "mean", None, PREPROCESS, pooled[0], labels[:train], pooled[1], labels[train:], keys, "all", *stored
    )


@pytest.fixture(scope="session")
def made_up() -> Callable[[Tensor, Tensor, int], FrozenFeatures]:
    return as_features


@pytest.fixture(scope="session")
def hidden_signal() -> FrozenFeatures:
    """1,000 images to train on and 400 to validate on, of 4 classes, with 12 patches of 16 channels.

    One random patch of each image holds its class, in the signs of two channels, and is marked by a third channel. All
    others are noise, and their signs in the same two channels are random and larger, so that a mean over patches shows
    little of the class.
    """
    draw = torch.Generator().manual_seed(1)
    count = 1400
    labels = torch.randint(4, (count,), generator=draw)
    signs = torch.stack([labels // 2 * 2 - 1, labels % 2 * 2 - 1], dim=1).float()
    patches = 0.3 * torch.randn(count, 12, 16, generator=draw)
    patches[:, :, :2] = 2.0 * torch.randint(2, (count, 12, 2), generator=draw) * 2 - 2
    place = torch.randint(12, (count,), generator=draw)
    patches[torch.arange(count), place, :2] = signs
    patches[torch.arange(count), place, 2] = 3.0
    return as_features(patches, labels, 1000)
