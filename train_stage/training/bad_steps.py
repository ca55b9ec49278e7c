"""Is a step's loss one to learn from? NaN, infinity and spikes are found, and said with the step they came in."""

from math import isfinite
from typing import Any

from ...shared.errors import DataError

_WEIGHT_OF_NEWEST = 0.02


class BadStep(DataError):
    """The loss of a step is NaN, infinite or a spike, and the run is to stop at such a step."""

    def __init__(self, step: int, problem: str):
        self.step, self.problem = step, problem
        super().__init__(f"Step {step} has {problem}.")


class LossWatch:
    """Finds losses that are no numbers, or many times the running mean of those before."""

    def __init__(self, spike: float | None):
        self._spike = spike
        self._mean: float | None = None
        self.in_a_row = 0
        """How many steps in a row were bad."""

    def problem(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step, or None."""
        found = self._find(loss, gradient_norm)
        self.in_a_row = self.in_a_row + 1 if found else 0
        if not found:
            self._mean = loss if self._mean is None else self._mean + _WEIGHT_OF_NEWEST * (loss - self._mean)
        return found

    def _find(self, loss: float, gradient_norm: float) -> str | None:
        if not isfinite(loss):
            return f"a loss of {loss}"
        if not isfinite(gradient_norm):
            return f"a gradient norm of {gradient_norm}"
        if self._spike is not None and self._mean is not None and loss > self._spike * self._mean:
            return f"a loss of {loss:.3f}, a spike over the running mean of {self._mean:.3f}"
        return None

    def to_json(self) -> dict[str, Any]:
        return {"mean": self._mean, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what `to_json` gave."""
        self._mean, self.in_a_row = state["mean"], state["in_a_row"]
