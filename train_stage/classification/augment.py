"""Augmentation of a training image: random crop, flip, RandAugment, random erasing.

Everything is drawn from (seed, epoch, key), so that it does not depend on workers, processes or restarts. RandAugment
is timm's own; random erasing draws timm's rectangles.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from ...shared.errors import UsageError
from ...shared.images.fast_pixels import replay_pixels
from ...shared.images.views import ViewPolicy, to_array
from ..settings import FinetuneSettings

_ERASED_AREA, _ERASED_RATIO, _ATTEMPTS = (0.02, 1 / 3), 0.3, 10
"""As in timm's `RandomErasing`: share of the area, lowest ratio of height to width (the highest is its inverse)."""


@contextmanager
def kept_global_randomness() -> Iterator[None]:
    """Restores Python's and NumPy's global random states afterwards. It takes 0.2 ms, so use it once per batch."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def erased_box(probability: float, size: int, drawn: random.Random) -> tuple[int, int, int, int] | None:
    """The (top, left, height, width) of the rectangle that random erasing fills in a `size` x `size` image, or None.

    Draws as timm's `RandomErasing` does.
    """
    if drawn.random() > probability:
        return None
    low, high = math.log(_ERASED_RATIO), math.log(1 / _ERASED_RATIO)
    for _ in range(_ATTEMPTS):
        area, ratio = drawn.uniform(*_ERASED_AREA) * size * size, math.exp(drawn.uniform(low, high))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if width < size and height < size:
            return drawn.randint(0, size - height), drawn.randint(0, size - width), height, width
    return None


@dataclass(frozen=True)
class Augment:
    """The augmentation of a run. Raises UsageError for a RandAugment policy that timm does not know."""

    settings: FinetuneSettings
    crops: ViewPolicy = field(init=False)
    rand_augment: Callable[[Image.Image], Image.Image] | None = field(init=False)

    def __post_init__(self) -> None:
        augment = self.settings.augment
        (low, high), (narrow, wide) = augment.crop_scale, augment.crop_ratio
        policy = ViewPolicy(
            "random-resized", 1, (low, high), (narrow, wide), augment.flip, seed=self.settings.train.seed
        )
        object.__setattr__(self, "crops", policy)
        object.__setattr__(self, "rand_augment", _rand_augment(self.settings))

    def __call__(self, pixels: Tensor, epoch: int, key: str, drawn: np.random.Generator) -> Tensor:
        """The augmented view of an upright image, uint8 (3, height, width) -> uint8 (3, S, S).

        `drawn` is the generator of this epoch and key, from which everything but crop and flip comes. timm draws from
        the global random states of Python and NumPy, which are seeded here; see `kept_global_randomness`.
        """
        data, size = self.settings.data, self.settings.model.image_size
        box, flip = self.crops.draw(key, epoch, pixels.shape[2], pixels.shape[1])
        view = replay_pixels(pixels, box, flip, size, data.interpolation)
        if self.rand_augment is not None:
            random.seed(int(drawn.integers(1 << 62)))
            np.random.seed(int(drawn.integers(1 << 32)))
            picture = Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())
            view = torch.from_numpy(to_array(self.rand_augment(picture)))
        if self.settings.augment.erasing:
            box_drawn = erased_box(
                self.settings.augment.erasing,
                size,
                random.Random(int(drawn.integers(1 << 62))),  # noqa: S311 (not for cryptography)
            )
            if box_drawn is not None:
                top, left, height, width = box_drawn
                view = view.clone()
                view[:, top : top + height, left : left + width] = torch.from_numpy(self._noise(height, width, drawn))
        return view

    def _noise(self, height: int, width: int, drawn: np.random.Generator) -> NDArray[np.uint8]:
        """Standard normal noise of normalised values, as pixels: uint8 (3, height, width), cut off at 0 and 255."""
        mean, std = (
            np.array(values, dtype=np.float32)[:, None, None]
            for values in (self.settings.data.mean, self.settings.data.std)
        )
        noise = drawn.standard_normal((3, height, width), dtype=np.float32)
        pixels: NDArray[np.uint8] = np.rint((noise * std + mean) * 255).clip(0, 255).astype(np.uint8)
        return pixels


def _rand_augment(settings: FinetuneSettings) -> Callable[[Image.Image], Image.Image] | None:
    """timm's RandAugment with the parameters that its `create_transform` gives it."""
    policy, data = settings.augment.rand_augment, settings.data
    if policy is None:
        return None
    parameters: dict[str, Any] = {
        "translate_const": int(settings.model.image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in data.mean),
        "interpolation": Image.Resampling[data.interpolation.upper()],
    }
    try:
        transform: Callable[[Image.Image], Image.Image] = rand_augment_transform(policy, parameters)
    except (AssertionError, KeyError, ValueError, IndexError):
        raise UsageError(
            f"augment.rand_augment {policy!r} is not a RandAugment policy of timm; use rand-m9-mstd0.5, or null."
        ) from None
    return transform
