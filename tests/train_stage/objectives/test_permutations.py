"""Permutations hold every patch once, masks have the exact size, and both are drawn from the right distribution."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapet.train_stage.objectives.permutations import draw_permutation, masked_blocks, permuted_blocks
from mapet.train_stage.settings import ObjectiveSettings

SETTINGS = [
    ObjectiveSettings(),
    ObjectiveSettings(permutation="block", permutation_block=3),
    ObjectiveSettings(name="mim"),
    ObjectiveSettings(name="mim", masking="uniform", mask_ratio=0.75),
]


def random(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize("settings", SETTINGS)
@given(side=st.integers(2, 14), seed=st.integers(0, 100))
def test_every_draw_is_a_permutation_of_all_patches(settings: ObjectiveSettings, side: int, seed: int):
    assert sorted(draw_permutation(settings, side, random(seed))) == list(range(side * side))


@given(side=st.integers(2, 14), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 100))
def test_blocks_mask_exactly_the_number_asked_for(side: int, ratio: float, seed: int):
    count = ObjectiveSettings(name="mim", mask_ratio=ratio).masked(side * side)
    assert 1 <= count < side * side
    assert masked_blocks(side, count, random(seed)).sum() == count


def neighbours(masked: np.ndarray) -> float:
    """Share of the pairs of adjacent patches of which both or neither are masked."""
    return float(np.mean([(masked[1:] == masked[:-1]).mean(), (masked[:, 1:] == masked[:, :-1]).mean()]))


def mask_of(settings: ObjectiveSettings, seed: int) -> np.ndarray:
    masked = np.zeros(196, dtype=bool)
    masked[draw_permutation(settings, 14, random(seed))[-settings.masked(196) :]] = True
    return masked.reshape(14, 14)


def test_block_masks_are_blocks_and_uniform_masks_are_not():
    block, uniform = (
        np.mean([neighbours(mask_of(ObjectiveSettings(name="mim", masking=masking), seed)) for seed in range(50)])
        for masking in ("block", "uniform")
    )
    assert uniform == pytest.approx(1 - 2 * 0.4 * 0.6, abs=0.02)
    assert block > 0.8


def test_rectangles_reach_every_patch_and_mirror_images_equally_often():
    frequency = np.mean([mask_of(SETTINGS[2], seed) for seed in range(2000)], axis=0)
    assert frequency.mean() == pytest.approx(78 / 196)
    assert frequency.min() > 0.02  # BEiT's rectangles favour the middle
    for mirrored in (frequency[::-1], frequency[:, ::-1], frequency.T):
        assert np.abs(frequency - mirrored).max() < 0.08


def test_a_block_permutation_finishes_a_square_before_it_begins_the_next():
    for seed in range(20):
        order = permuted_blocks(8, 4, random(seed))
        row, column = np.divmod(order, 8)
        runs = {
            offset: len(np.flatnonzero(np.diff((row + offset[0]) // 4 * 9 + (column + offset[1]) // 4))) + 1
            for offset in np.ndindex(4, 4)
        }
        squares = {offset: (2 + (offset[0] > 0)) * (2 + (offset[1] > 0)) for offset in runs}
        assert any(runs[offset] == squares[offset] for offset in runs), "no offset makes the order one of squares"
    first = {tuple(permuted_blocks(8, 4, random(seed))[:1]) for seed in range(200)}
    assert len(first) > 50  # any patch may come first


def test_uniform_permutations_put_every_patch_first_equally_often():
    first = np.bincount([draw_permutation(SETTINGS[0], 4, random(seed))[0] for seed in range(4000)], minlength=16)
    assert first.min() > 180
    assert first.max() < 330
