"""The learning rate of what is trained on frozen features."""

import math


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate in a step, from 0 on: it rises in `warmup` steps and falls by a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2
