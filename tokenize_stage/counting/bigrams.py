"""How well a token is predicted by the one beside it or above it: a bigram model on images held out from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from .information import ranks
from .sample import SampledImages

_FIFTHS = 5
_CONCENTRATIONS = tuple(4.0**power for power in range(-1, 12))


class Bigrams(TypedDict):
    """Cross-entropy of held-out tokens given a neighbour, and without it, in bits per token.

    Of a sample of images, three fifths fit both models, one chooses the concentration c, and on one both are measured;
    the hash of an image's key decides. n counts the fitted pairs (a, b), T is how many codes b occur in them:

        unigram  p(b)     = (n(b) + T / K) / (n + T)                     (Witten and Bell 1991)
        bigram   p(b | a) = (n(a, b) + c p(b)) / (n(a) + c)              (MacKay and Peto 1995)

    A bigram that was never seen costs what the unigram model says, so that the gain of unrelated tokens is about 0. Of
    many codes few pairs are seen, and the gain is then a lower bound of what tokens tell about each other.
    """

    pairs: int
    """Held-out pairs that were measured."""
    fitted_pairs: int
    concentration: float
    unigram_bits: float
    bigram_bits: float
    gain_bits: float
    """unigram_bits - bigram_bits."""
    share: float
    """gain_bits / unigram_bits; 0 where all tokens are one code."""
    chance_bits: float
    """The gain if the neighbour is taken from another image, at its place: what the place in the grid alone tells."""


class BothWays(TypedDict):
    """None where the grid has no such neighbours, or too few images."""

    horizontal: Bigrams | None
    """A token given the one to its left."""
    vertical: Bigrams | None
    """A token given the one above it."""


def bigrams_of(images: SampledImages, k: int) -> BothWays:
    """Fits and measures bigram models of codes below `k`, in both directions."""
    tokens = ranks(images.tokens)
    parts = images.hashes % np.uint64(_FIFTHS)
    return {
        "horizontal": _measured(tokens[..., :-1], tokens[..., 1:], parts, k),
        "vertical": _measured(tokens[..., :-1, :], tokens[..., 1:, :], parts, k),
    }


@dataclass(frozen=True)
class _Pairs:
    """Pairs (a, b) of the three parts of the images, each (2, pairs)."""

    fitted: NDArray[np.int64]
    chosen: NDArray[np.int64]
    held_out: NDArray[np.int64]

    @classmethod
    def of(cls, first: NDArray[np.int64], second: NDArray[np.int64], parts: NDArray[np.uint64]) -> "_Pairs":
        def pairs(where: NDArray[np.bool_]) -> NDArray[np.int64]:
            return np.stack([first[where].reshape(-1), second[where].reshape(-1)])

        return cls(pairs(parts < _FIFTHS - 2), pairs(parts == _FIFTHS - 2), pairs(parts == _FIFTHS - 1))

    @property
    def is_enough(self) -> bool:
        return all(part.size for part in (self.fitted, self.chosen, self.held_out))


class _Model:
    """The two models of `Bigrams`; codes are numbered from 0 on."""

    def __init__(self, pairs: NDArray[np.int64], k: int, codes: int):
        first, second = pairs
        self.width = codes
        self.cells, self.counts = np.unique(first * codes + second, return_counts=True)
        self.of_first = np.bincount(first, minlength=codes)
        of_second = np.bincount(second, minlength=codes)
        used = int((of_second > 0).sum())
        self.unigram = (of_second + used / k) / (len(second) + used)

    def unigram_bits(self, pairs: NDArray[np.int64]) -> float:
        return float(-np.log2(self.unigram[pairs[1]]).mean())

    def bigram_bits(self, pairs: NDArray[np.int64], concentrations: Sequence[float]) -> list[float]:
        """One value per concentration."""
        first, second = pairs
        wanted = first * self.width + second
        at = np.minimum(np.searchsorted(self.cells, wanted), len(self.cells) - 1)
        seen = np.where(self.cells[at] == wanted, self.counts[at], 0)
        unigram, of_first = self.unigram[second], self.of_first[first]
        return [float(-np.log2((seen + c * unigram) / (of_first + c)).mean()) for c in concentrations]


def _measured(first: NDArray[np.int64], second: NDArray[np.int64], parts: NDArray[np.uint64], k: int) -> Bigrams | None:
    pairs = _Pairs.of(first, second, parts)
    if not pairs.is_enough:
        return None
    codes = int(max(first.max(), second.max())) + 1
    unigram, bigram, concentration = _bits(pairs, k, codes)
    # The sample is in random order: the image before is any other image.
    unrelated = _Pairs.of(np.roll(first, 1, axis=0), second, parts)
    alone, placed, _ = _bits(unrelated, k, codes)
    return {
        "pairs": pairs.held_out.shape[1],
        "fitted_pairs": pairs.fitted.shape[1],
        "concentration": concentration,
        "unigram_bits": unigram,
        "bigram_bits": bigram,
        "gain_bits": unigram - bigram,
        "share": (unigram - bigram) / unigram if unigram else 0.0,
        "chance_bits": alone - placed,
    }


def _bits(pairs: _Pairs, k: int, codes: int) -> tuple[float, float, float]:
    """(bits of the unigram model, bits of the bigram model, its concentration)."""
    model = _Model(pairs.fitted, k, codes)
    best = _CONCENTRATIONS[int(np.argmin(model.bigram_bits(pairs.chosen, _CONCENTRATIONS)))]
    (bigram,) = model.bigram_bits(pairs.held_out, [best])
    return model.unigram_bits(pairs.held_out), bigram, best
