"""What is known of one step of training."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from torch import Tensor

BANDS = 8
"""Into how many bands the ranks of the permutation are divided for the accuracy by rank."""


@dataclass(frozen=True)
class StepMetrics:
    """One step of the whole global batch; tensors are still on the device, so that nothing waits for them."""

    loss: Tensor | float
    """Mean cross-entropy in nats."""
    right: Tensor | Sequence[float]
    """(BANDS,) float: right guesses in each band of ranks."""
    guesses: Sequence[int]
    """(BANDS,): all guesses."""
    gradient_norm: Tensor | float
    images: int
    lr: float
    problem: str | None = None
    """Why the step's update was left out, if it was."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, null where one is not finite."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {"loss": finite_or_none(self.loss), "gradient_norm": finite_or_none(self.gradient_norm)}
        content["right"] = self.right.tolist() if isinstance(self.right, Tensor) else list(self.right)
        return {**content, "guesses": list(self.guesses)}


def finite_or_none(value: Tensor | float | None) -> float | None:
    found = float("nan") if value is None else float(value)
    return found if isfinite(found) else None
