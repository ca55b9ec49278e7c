"""What a line of metrics.jsonl or probe.jsonl holds. Metrics that are not named here are left alone."""

from pathlib import Path
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from ...shared.artifacts.fields import Count, checked

Number = float | UnsetType | None
"""A metric; None where it was not finite or, in a line of skipped steps, where there is none."""


class MetricsLine(Struct):
    """The metrics after a step. Every line of a run's .jsonl files has a step; the rest depends on the file."""

    step: Count
    epoch: Number = UNSET
    loss: Number = UNSET
    accuracy: Number = UNSET
    accuracy_by_rank: list[float | None] | UnsetType | None = UNSET
    cosine: Number = UNSET
    cosine_by_rank: list[float | None] | UnsetType | None = UNSET
    lr: Number = UNSET
    gradient_norm: Number = UNSET
    skipped_steps: Number = UNSET
    images_per_second: Number = UNSET
    data_wait: Number = UNSET
    mfu: Number = UNSET
    memory_mb: Number = UNSET
    knn: Number = UNSET
    linear: Number = UNSET
    top1: Number = UNSET


def checked_line(line: Any, path: Path) -> dict[str, Any]:
    """The line itself. Raises DataError naming the file and the field, unless it is one of a run's log."""
    checked(line, MetricsLine, path, "take the line out, or restore the file")
    content: dict[str, Any] = line
    return content
