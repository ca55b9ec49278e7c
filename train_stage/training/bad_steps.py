"""Detects bad steps: NaN, infinite or spiking loss."""

from math import isfinite
from typing import Any

from ...shared.errors import DataError

_WEIGHT_OF_NEWEST = 0.02


class BadStep(DataError):
    """The loss of a step is NaN, infinite or a spike, and the run is set to stop at such a step."""

    def __init__(self, step: int, problem: str) -> None:
        self.step, self.problem = step, problem
        super().__init__(f"Step {step} has {problem}.")


class LossMonitor:
    """Detects losses that are not finite, or `spike` times the running mean of the losses before."""

    def __init__(self, spike: float | None) -> None:
        self._spike = spike
        self._mean: float | None = None
        self.in_a_row = 0
        """Consecutive bad steps up to now."""

    def problem(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with a step, or None. A good step enters the running mean."""
        problem = self._check(loss, gradient_norm)
        self.in_a_row = self.in_a_row + 1 if problem else 0
        if not problem:
            self._mean = loss if self._mean is None else self._mean + _WEIGHT_OF_NEWEST * (loss - self._mean)
        return problem

    def _check(self, loss: float, gradient_norm: float) -> str | None:
        if not isfinite(loss):
            return f"a loss of {loss}"
        if not isfinite(gradient_norm):
            return f"a gradient norm of {gradient_norm}"
        if self._spike is not None and self._mean is not None and loss > self._spike * self._mean:
            return f"a loss of {loss:.3f}, a spike over the running mean of {self._mean:.3f}"
        return None

    def to_json(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return {"mean": self._mean, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the state that `to_json` gave."""
        self._mean, self.in_a_row = state["mean"], state["in_a_row"]
