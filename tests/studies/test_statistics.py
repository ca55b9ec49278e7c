"""Means and paired intervals, against examples that are worked by hand."""

import pytest
from mapet.studies.statistics import paired_difference, spread


def test_a_spread_is_mean_and_sample_deviation():
    # Deviations of 1, 2, 6 from 3 are -2, -1, 3; their squares sum to 14, and 14 / 2 = 7.
    found = spread([1.0, 2.0, 6.0])
    assert (found.mean, found.deviation, found.seeds) == (3.0, pytest.approx(7**0.5), 3)
    assert spread([0.5]).deviation is None


def test_the_interval_of_three_pairs_uses_students_t():
    # Differences 1, 2, 3: mean 2, deviation 1; t(0.975, 2 degrees) = 4.302653 (any table), divided by sqrt(3).
    pytest.importorskip("scipy")
    found = paired_difference({0: 2.0, 1: 4.0, 2: 6.0, 9: 50.0}, {0: 1.0, 1: 2.0, 2: 3.0, 7: 0.0})
    half = 4.302653 / 3**0.5
    assert found is not None
    assert found.mean == pytest.approx(2)
    assert found.low == pytest.approx(2 - half, rel=1e-6)
    assert found.high == pytest.approx(2 + half, rel=1e-6)
    assert found.pairs == 3
    assert not found.is_significant


def test_the_interval_is_that_of_scipys_paired_test():
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [0.61, 0.58, 0.66, 0.63, 0.6], [0.55, 0.57, 0.58, 0.6, 0.52]
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.is_significant == (stats.ttest_rel(ours, theirs).pvalue < 0.05)


def test_one_pair_has_no_interval_and_none_has_no_difference():
    found = paired_difference({3: 1.0}, {3: 0.25})
    assert found is not None
    assert (found.mean, found.low, found.high, found.is_significant) == (0.75, None, None, False)
    assert paired_difference({3: 1.0}, {4: 1.0}) is None


def test_differences_that_are_all_equal_have_no_interval():
    # Two small test sets often give the same difference twice; an interval of no width would look certain.
    found = paired_difference({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.6, 2: 0.8})
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high, found.is_significant) == (None, None, False)
