"""Says beforehand how long k-means will take, where that is more than a day."""

import time

import numpy as np

from ...shared.runtime.console import say
from .train import HIERARCHICAL, LLOYD, KMeansSettings, flat_index

_DAY = 86_400.0
_NEVER_A_DAY = 10**14
"""So many products take less than a day on any machine."""
_ROWS, _CODES = 4096, 4096


def say_if_long(count: int, dim: int, settings: KMeansSettings) -> None:
    """Says how long k-means of `count` rows will take here, and what is faster, if it is more than a day."""
    if comparisons(count, settings) * dim < _NEVER_A_DAY:
        return
    rate = comparisons_per_second(dim, settings.metric)
    seconds = comparisons(count, settings) / rate
    if seconds < _DAY:
        return
    text = f"k-means of {count:,} patches x {dim} features with K={settings.k} will take about {_in_days(seconds)} here"
    if settings.algorithm == LLOYD:
        others = KMeansSettings(k=settings.k, iterations=settings.iterations, restarts=1, algorithm=HIERARCHICAL)
        faster = _in_days(comparisons(count, others) / rate)
        text += f"; --algorithm {HIERARCHICAL} --restarts 1 about {faster}, with a somewhat larger error"
    say(f"{text}.")


def comparisons(count: int, settings: KMeansSettings) -> int:
    """How many pairs of a row and a centroid k-means compares, the final assignment of all rows included."""
    levels = [settings.k] if settings.algorithm == LLOYD else [settings.cells, settings.k // settings.cells]
    return count * (settings.iterations * settings.restarts * sum(levels) + settings.k)


def comparisons_per_second(dim: int, metric: str) -> float:
    """How many pairs of vectors of `dim` numbers FAISS compares per second on this machine, measured."""
    vectors = np.random.default_rng(0).standard_normal((_ROWS, dim), dtype=np.float32)
    index = flat_index(dim, metric)
    index.add(vectors[:_CODES])
    index.search(vectors[:64], 1)  # threads and GPUs start at the first search
    began = time.perf_counter()
    index.search(vectors, 1)
    return _ROWS * _CODES / (time.perf_counter() - began)


def _in_days(seconds: float) -> str:
    return f"{seconds / _DAY:.1f} days" if seconds >= _DAY else f"{max(seconds / 3600, 0.1):.1f} hours"
