"""Means over seeds, and differences paired by seed with their confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
_SAME = 1e-12
"""Deviation of differences that are equal but for rounding: they say nothing about how far differences vary."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation (n - 1); None of one seed."""
    seeds: int


@dataclass(frozen=True)
class Difference:
    """A mean difference of pairs and its confidence interval."""

    mean: float
    low: float | None
    """None of fewer than two pairs, or if all differences are equal."""
    high: float | None
    pairs: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def spread(values: Sequence[float]) -> Spread:
    """The mean of at least one value and how far values are from it."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """The mean of `values` minus `baseline` over the seeds of both, with Student's t interval of the differences.

    Args:
        values: by seed.
        baseline: by seed.

    Returns:
        None if they have no seed in common.
    """
    pairs = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if not pairs:
        return None
    mean = fmean(pairs)
    if len(pairs) < 2 or stdev(pairs) < _SAME:
        return Difference(mean, None, None, len(pairs))
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * stdev(pairs) / len(pairs) ** 0.5
    return Difference(mean, mean - half, mean + half, len(pairs))
