"""The metrics of one training step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepMetrics:
    """One step on the whole global batch. Tensors are still on the device, so that the host does not wait for them."""

    loss: Tensor | float
    """Mean over all predictions; for cross-entropy in nats."""
    right: Tensor | Sequence[float]
    """(bands,) float: right predictions, or the sum of their similarities, in each band (`task.Bands`)."""
    guesses: Sequence[int]
    """(bands,): all predictions."""
    gradient_norm: Tensor | float
    """Of all gradients together, before clipping."""
    images: int
    """Of the global batch."""
    lr: float
    problem: str | None = None
    """Why the update of this step was skipped, if it was."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, null where one is not finite."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        content |= {"loss": finite_or_none(self.loss), "gradient_norm": finite_or_none(self.gradient_norm)}
        content["right"] = self.right.tolist() if isinstance(self.right, Tensor) else list(self.right)
        return {**content, "guesses": list(self.guesses)}


def finite_or_none(value: Tensor | float | None) -> float | None:
    """A number as JSON can hold it."""
    number = float("nan") if value is None else float(value)
    return number if isfinite(number) else None
