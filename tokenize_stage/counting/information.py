"""Mutual information and purity of two labellings of the same tokens, with what chance gives.

Counts are kept of the pairs that occur, so that memory depends on the number of tokens and not on that of codes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ...shared.tokens.code_usage import usage

ROLLS = (1, 2, 3)
"""Chance pairs each image of a sample with the one that many images further on, and takes the mean."""


class Score(TypedDict):
    """A figure that chance alone raises, so that it cannot be compared between stores of different K as it is."""

    value: float
    chance: float | None
    """The same if images are unrelated; None where there is one image."""
    adjusted: float | None
    """(value - chance) / (highest - chance): 0 for chance, 1 for the highest possible value, whatever K is. None where
    chance is not known or leaves no room above it."""


class Information(TypedDict):
    """Mutual information of two labellings."""

    bits: float
    chance_bits: float | None
    nmi: Score
    """Normalised mutual information: mutual information / mean of the two entropies. Its `adjusted` is the adjusted
    mutual information (AMI; Vinh, Epps and Bailey 2010), with the chance above."""


@dataclass(frozen=True)
class Joint:
    """How often each pair (a, b) occurs: arrays of one length, with a and b numbered from 0 on."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, first: NDArray[np.int64], second: NDArray[np.int64]) -> "Joint":
        """Counts pairs of two arrays of one shape, numbered as by `ranks`."""
        width = int(second.max(initial=0)) + 1
        cells, counts = np.unique(first.reshape(-1) * width + second.reshape(-1), return_counts=True)
        return cls(cells // width, cells % width, counts)

    def purity(self) -> float:
        """The share of tokens whose a is the most common one among the tokens of the same b."""
        return _share_of_most_common(self.second, self.counts)

    def inverse_purity(self) -> float:
        """`purity` with a and b exchanged."""
        return _share_of_most_common(self.first, self.counts)

    def entropies(self) -> tuple[float, float, float]:
        """Of a, of b and of the pair, in bits."""
        a, b = (_sums(part, self.counts) for part in (self.first, self.second))
        of_a, of_b, of_pairs = (float(usage(counts)["entropy_bits"]) for counts in (a, b, self.counts))
        return of_a, of_b, of_pairs

    def mutual_information(self) -> float:
        """In bits."""
        of_a, of_b, of_pairs = self.entropies()
        return max(of_a + of_b - of_pairs, 0.0)


def ranks(values: NDArray[Any]) -> NDArray[np.int64]:
    """Integers of any type and range as numbers from 0 on, in an array of the same shape."""
    return np.unique(values, return_inverse=True)[1].reshape(values.shape).astype(np.int64, copy=False)


def score(value: float, by_chance: Iterable[float], highest: float = 1.0) -> Score:
    """`value` beside the mean of what chance gave."""
    chances = list(by_chance)
    chance = float(np.mean(chances)) if chances else None
    # Rounding must not become a figure where chance leaves no room.
    room = None if chance is None or highest - chance < 1e-9 else highest - chance
    adjusted = None if room is None or chance is None else (value - chance) / room
    return {"value": value, "chance": chance, "adjusted": adjusted}


def information(joint: Joint, by_chance: Iterable[Joint]) -> Information | None:
    """The mutual information of `joint`, or None if both entropies are 0; `by_chance` counts unrelated images."""
    of_a, of_b, _ = joint.entropies()
    mean, bits = (of_a + of_b) / 2, joint.mutual_information()
    if not mean:
        return None
    chances = [chance.mutual_information() for chance in by_chance]
    return {
        "bits": bits,
        "chance_bits": float(np.mean(chances)) if chances else None,
        "nmi": score(bits / mean, (chance / mean for chance in chances)),
    }


def rolled(images: int) -> list[int]:
    """By how many images a sample is rolled to pair each with an unrelated one; empty for a single image."""
    return [by for by in ROLLS if by < images]


def _share_of_most_common(groups: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    most = np.zeros(int(groups.max(initial=0)) + 1, np.int64)
    np.maximum.at(most, groups, counts)
    return float(most.sum() / counts.sum())


def _sums(groups: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.bincount(groups, counts).astype(np.int64)
