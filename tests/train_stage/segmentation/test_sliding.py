"""Windows over images, and their logits at another size."""

import numpy as np
import pytest
import torch
from mapet.train_stage.segmentation.sliding import argmax_resized, windows


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 65), (64, 106), (64, 107), (300, 64)])
def test_windows_cover_the_image_and_end_at_its_edges(height: int, width: int):
    covered = np.zeros((height, width), int)
    corners = list(windows(height, width, 64))
    for top, left in corners:
        assert 0 <= top <= height - 64
        assert 0 <= left <= width - 64
        covered[top : top + 64, left : left + 64] += 1
    assert covered.min() >= 1
    assert len(set(corners)) == len(corners)
    stride = int(64 * 341 / 512)
    expected = [-(-(length - 64) // stride) + 1 for length in (height, width)]
    assert len(corners) == expected[0] * expected[1]


def test_classes_a_few_at_a_time_are_the_argmax_of_all():
    logits = torch.randn(40, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(logits[None], size=(11, 20), mode="bilinear", align_corners=False)[0]
    assert torch.equal(argmax_resized(logits, 11, 20), whole.argmax(0))
