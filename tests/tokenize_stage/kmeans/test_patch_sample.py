"""The sample of patches is uniform, without replacement, and depends on the seed and the keys alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.tokenize_stage.kmeans.patch_sample import PatchSample, choose_images, draw_sample

KEYS = [f"class{number % 3}/image-{number}" for number in range(40)]


def in_order(sample: PatchSample, keys: list[str]) -> list[tuple[str, int]]:
    """(key, patch) of the whole sample, in the order of the draws."""
    found = [(draw, key, int(patch)) for key in keys for patch, draw in zip(*sample.of_image(key), strict=True)]
    return [(key, patch) for _, key, patch in sorted(found)]


def count_of_training(sample: PatchSample, keys: list[str]) -> int:
    return sum(int((sample.of_image(key)[1] <= np.uint64(sample.most_train)).sum()) for key in keys)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.data(), st.integers(0, 2**31))
def test_a_sample_has_as_many_patches_as_asked_for_and_none_twice(
    images: int, patches: int, data: st.DataObject, seed: int
):
    wanted = data.draw(st.integers(1, images * patches))
    held_out = data.draw(st.integers(0, wanted - 1))
    keys = KEYS[:images]
    sample = draw_sample(keys, patches, wanted - held_out, held_out, seed)
    found = in_order(sample, keys)
    assert len(found) == len(set(found)) == wanted
    assert count_of_training(sample, keys) == wanted - held_out
    assert all(0 <= patch < patches for _, patch in found)


def test_more_than_there_is_gives_all_there_is():
    sample = draw_sample(KEYS, 5, 1000, 1000, 0)
    assert len(in_order(sample, KEYS)) == count_of_training(sample, KEYS) == 200


@pytest.mark.parametrize("wanted", [1, 50, 200])
def test_the_order_of_the_keys_does_not_matter(wanted: int):
    shuffled = [KEYS[at] for at in np.random.default_rng(0).permutation(len(KEYS))]
    assert draw_sample(KEYS, 5, wanted, 0, 3) == draw_sample(shuffled, 5, wanted, 0, 3)


def test_many_images_in_several_blocks_give_the_same_sample_as_one_block():
    # Blocks hold 2**20 patches: the same keys with many patches each go through the reduction several times.
    keys, patches = KEYS[:9], 300_000
    sample = draw_sample(keys, patches, 500, 20, 1)
    assert sample == draw_sample(keys[::-1], patches, 500, 20, 1)
    found = in_order(sample, keys)
    assert len(found) == 520
    assert len({key for key, _ in found}) == 9


def test_a_smaller_sample_is_the_beginning_of_a_larger_one():
    large, small = (in_order(draw_sample(KEYS, 5, wanted, 0, 3), KEYS) for wanted in (100, 30))
    assert large[:30] == small


def test_the_seed_and_the_keys_change_the_sample():
    base = in_order(draw_sample(KEYS, 5, 20, 0, 3), KEYS)
    assert in_order(draw_sample(KEYS, 5, 20, 0, 4), KEYS) != base
    renamed = [f"{key}x" for key in KEYS]
    assert [(key[:-1], patch) for key, patch in in_order(draw_sample(renamed, 5, 20, 0, 3), renamed)] != base


def test_every_patch_is_drawn_equally_often_for_training_and_held_out():
    draws, keys, patches, train, held_out = 3000, KEYS[:6], 5, 8, 4
    counts = np.zeros((2, 6, 5))
    for seed in range(draws):
        sample = draw_sample(keys, patches, train, held_out, seed)
        for image, key in enumerate(keys):
            places, drawn = sample.of_image(key)
            np.add.at(counts, ((drawn > np.uint64(sample.most_train)).astype(int), image, places), 1)
    for found, wanted in zip(counts, (train, held_out), strict=True):
        share = wanted / 30
        deviations = (found - draws * share) / np.sqrt(draws * share * (1 - share))
        # Thirty nearly independent standard normals: beyond 4.5 with a probability of 2e-4 in all.
        assert np.abs(deviations).max() < 4.5
        assert 8 < (deviations**2).sum() < 70


def test_chosen_images_are_seeded_and_in_the_sources_order():
    chosen = choose_images(KEYS, 10, 1)
    assert len(chosen) == 10
    assert chosen == sorted(chosen, key=KEYS.index)
    assert chosen == choose_images(KEYS, 10, 1)
    assert chosen != choose_images(KEYS, 10, 2)


def test_chosen_images_do_not_depend_on_the_sources_order():
    shuffled = [KEYS[at] for at in np.random.default_rng(0).permutation(len(KEYS))]
    chosen, again = (set(choose_images(keys, 10, 1)) for keys in (KEYS, shuffled))
    assert chosen == again


def test_images_are_chosen_equally_often():
    counts = dict.fromkeys(KEYS[:12], 0)
    for seed in range(2000):
        for key in choose_images(KEYS[:12], 4, seed):
            counts[key] += 1
    deviations = (np.array(list(counts.values())) - 2000 / 3) / np.sqrt(2000 * 2 / 9)
    assert np.abs(deviations).max() < 4.5


@pytest.mark.parametrize("most", [None, 40, 1000])
def test_all_images_are_taken_where_there_are_no_more(most: int | None):
    assert choose_images(KEYS, most, 1) == KEYS
