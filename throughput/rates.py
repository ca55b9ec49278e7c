"""Rates of the package's code and of its references, measured in turns within one run."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Side = Callable[[], tuple[float, float]]
"""Does a piece of work; returns its amount, such as a number of images, and the seconds that it took."""
FEWEST_ROUNDS, _MOST_ROUNDS = 3, 101


@dataclass(frozen=True)
class Comparison:
    """Rates (amount per second) of the package's code and of a reference, one of each per round."""

    ours: tuple[float, ...]
    bare: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """The package's rate over the reference's, by round."""
        return [mine / reference for mine, reference in zip(self.ours, self.bare, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of `ratios`: load on the machine that both sides of a round share does not change it."""
        return statistics.median(self.ratios)

    @property
    def rate(self) -> float:
        """The median rate of the package's code."""
        return statistics.median(self.ours)

    @property
    def bare_rate(self) -> float:
        """The median rate of the reference."""
        return statistics.median(self.bare)

    def scaled(self, ours: float, bare: float) -> "Comparison":
        """The rates in other units: multiplied by `ours` and `bare`."""
        return Comparison(tuple(ours * rate for rate in self.ours), tuple(bare * rate for rate in self.bare))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    """What was measured, such as "loader"."""
    against: str
    """The bare reference, in words."""
    unit: str
    """Of both rates."""
    rates: Comparison

    def to_json(self) -> dict[str, Any]:
        """The row for machines: medians, the median ratio and the range of ratios."""
        return {
            "part": self.part,
            "rate": self.rates.rate,
            "bare_rate": self.rates.bare_rate,
            "unit": self.unit,
            "ratio": self.rates.ratio,
            "range": [min(self.rates.ratios), max(self.rates.ratios)],
            "rounds": len(self.rates.ours),
            "against": self.against,
        }


def timer() -> float:
    """Seconds, once the GPU has done what it was given (torch.utils.benchmark's clock, which warns when imported)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], object], amount: float) -> Side:
    """A side that does `amount` of work by calling `call`."""

    def run() -> tuple[float, float]:
        began = timer()
        call()
        return amount, timer() - began

    return run


def steady(batches: Iterator[T], skipped: int, amount: Callable[[T], int]) -> tuple[float, float]:
    """The amount in all but the first `skipped` of some batches, and the seconds from the arrival of those to the end.

    With one batch skipped for each loader process, the start of the processes is not measured.
    """
    for _ in islice(batches, skipped):
        pass
    began = timer()
    done = sum(map(amount, batches))
    return done, timer() - began


def in_turns(sides: Sequence[Side], seconds: float) -> list[tuple[float, ...]]:
    """The rates of each side by round: A B C A B C ..., after one run of each that does not count.

    There are rounds for about `seconds`, but at least `FEWEST_ROUNDS`.
    """
    began = timer()
    for side in sides:
        side()
    rounds: list[list[float]] = []
    while len(rounds) < FEWEST_ROUNDS or (timer() - began < seconds and len(rounds) < _MOST_ROUNDS):
        rounds.append([_rate(*side()) for side in sides])
    return list(zip(*rounds, strict=True))


def compare(ours: Side, bare: Side, seconds: float) -> Comparison:
    """The package's code beside a reference, in turns."""
    return Comparison(*in_turns((ours, bare), seconds))


def _rate(amount: float, seconds: float) -> float:
    return amount / max(seconds, 1e-9)


def cycled(items: Sequence[T], size: int, batches: int) -> list[list[T]]:
    """Batches of `size` items, beginning again at the first item as often as needed."""
    return [[items[(start + place) % len(items)] for place in range(size)] for start in _starts(size, batches)]


def _starts(size: int, batches: int) -> Iterable[int]:
    return range(0, size * batches, size)
