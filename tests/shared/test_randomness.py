"""Draws depend on their names alone."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapet.shared.randomness import generator


def draws(*names: object) -> tuple[int, ...]:
    return tuple(generator(*names).bit_generator.random_raw(4).tolist())


def test_equal_names_give_equal_draws_whatever_was_drawn_before():
    first = draws(0, "permutation", 3, "key")
    generator(1, "other").random(1000)
    np.random.default_rng(5).random(10)
    assert draws(0, "permutation", 3, "key") == first


def test_draws_are_equal_on_every_machine_and_in_every_version():
    # A change here would change every sample, permutation and crop of every seed.
    assert generator(0, "a", "key").permutation(6).tolist() == [5, 4, 0, 3, 1, 2]


@given(st.text(max_size=20), st.integers())
def test_the_key_of_philox_is_the_digest_of_the_names(name: str, number: int):
    digest = hashlib.blake2b(f"{name}\x1f{number}".encode(), digest_size=16).digest()
    theirs = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    ours = generator(name, number)
    assert ours.bit_generator.state["state"]["key"].tolist() == theirs.bit_generator.state["state"]["key"].tolist()
    assert np.array_equal(ours.random(5), theirs.random(5))
    assert np.array_equal(ours.permutation(9), theirs.permutation(9))


def test_different_names_give_different_draws():
    names = [
        (0,),
        (1,),
        (0, "a"),
        ("a", 0),
        (0, "a", "b"),
        (0, "b"),
        (0, "a", 1),
        ("0a",),
        (0, "ab"),
        (0, "a", ""),
    ]
    for one, other in itertools.combinations(names, 2):
        assert draws(*one) != draws(*other), (one, other)


@pytest.mark.parametrize(("one", "other"), [(("a", "bc"), ("ab", "c")), ((1, 23), (12, 3)), (("", "a"), ("a", ""))])
def test_names_that_join_to_the_same_text_differ(one: tuple, other: tuple):
    assert draws(*one) != draws(*other)


def test_draws_of_many_keys_look_uniform():
    values = np.array([generator(0, "key", number).random() for number in range(4000)])
    counts = np.bincount((values * 20).astype(int), minlength=20)
    # Chi-square with 19 degrees of freedom is below 50 with probability 0.9999.
    assert ((counts - 200) ** 2 / 200).sum() < 50
