"""Rates of two sides that take turns: medians, ratios, and what is not measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapet.throughput.rates import FEWEST_ROUNDS, Comparison, Row, cycled, in_turns, steady

RATES = st.lists(st.tuples(*[st.floats(1e-3, 1e9)] * 2), min_size=1, max_size=9)


def test_a_ratio_is_the_median_of_the_rounds():
    rates = Comparison(ours=(10, 50, 12), bare=(20, 100, 10))
    assert rates.ratios == [0.5, 0.5, 1.2]
    assert (rates.rate, rates.bare_rate, rates.ratio) == (12, 20, 0.5)


@given(RATES)
def test_the_two_rates_of_a_row_agree_with_its_range_of_ratios(rounds):
    ours, bare = zip(*rounds, strict=True)
    row = Row("step", "a reference", "images/s", Comparison(ours, bare)).to_json()
    low, high = row["range"]
    assert low <= row["ratio"] <= high
    if len(rounds) % 2:  # a median is then one of the rates, and low * bare <= ours <= high * bare in each round
        assert low * (1 - 1e-9) <= row["rate"] / row["bare_rate"] <= high * (1 + 1e-9)


@given(RATES, st.floats(0.01, 100), st.floats(0.01, 100))
def test_other_units_scale_the_ratio(rounds, mine, reference):
    rates = Comparison(*zip(*rounds, strict=True))
    assert rates.scaled(mine, reference).ratio == pytest.approx(rates.ratio * mine / reference)


def test_sides_take_turns_after_one_run_of_each_that_does_not_count():
    order = []

    def side(name, rate):
        def run():
            order.append(name)
            return rate * len(order), len(order)

        return run

    rates = in_turns([side("a", 2.0), side("b", 5.0)], seconds=0)
    assert order == ["a", "b"] * (1 + FEWEST_ROUNDS)
    assert rates == [(2.0,) * FEWEST_ROUNDS, (5.0,) * FEWEST_ROUNDS]


def test_the_first_batches_of_a_loader_do_not_count():
    done, seconds = steady(iter([[1], [2, 3], [4, 5, 6]]), 1, len)
    assert done == 5
    assert seconds >= 0


def test_few_images_fill_many_batches():
    assert cycled("abc", 2, 3) == [["a", "b"], ["c", "a"], ["b", "c"]]
