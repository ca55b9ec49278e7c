"""What a segmentation achieves, and its tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...shared.runtime.console import foreign, results
from ..masked.data import SegmentationData
from .scores import Measured


@dataclass(frozen=True)
class SegmentationResult:
    """What one segmentation achieves on the validation images; figures lie in [0, 1]."""

    features: str
    """Whose features: "pre-trained", "random init" or "from scratch"."""
    classifier: str
    """What reads them: "logistic regression", "k-NN", "linear head" or "UPerNet"."""
    mean_iou: float
    """Mean intersection over union of the classes that occur in the validation masks."""
    pixel_accuracy: float
    """Share of the pixels that are right, ignored ones left out."""
    iou: dict[str, float | None]
    """By the name of each class, or its index; None for one that does not occur in the validation masks."""
    protocol: dict[str, Any]
    """Everything that is needed to repeat the measurement, as plain JSON values."""

    def to_json(self) -> dict[str, Any]:
        return {
            "features": self.features,
            "classifier": self.classifier,
            "numbers": {"mean_iou": self.mean_iou, "pixel_accuracy": self.pixel_accuracy},
            "iou": self.iou,
            "protocol": self.protocol,
        }

    @classmethod
    def of(cls, measured: Measured, data: "SegmentationData") -> "SegmentationResult":
        scores = measured.scores
        protocol = {
            "mean_iou": "mean over the classes that occur in the validation masks",
            "ignored": list(data.rule.ignore),
            "classes": data.classes,
            **measured.protocol,
        }
        iou = {data.rule.name_of(index): value for index, value in enumerate(scores.iou)}
        return cls(measured.features, measured.classifier, scores.mean_iou, scores.pixel_accuracy, iou, protocol)


def show_tables(rows: Sequence[SegmentationResult], *, as_json: bool = False) -> None:
    """Prints the figures as two tables, or everything as one JSON object; of no rows nothing."""
    if not rows:
        return
    if as_json:
        results.print_json({"rows": [row.to_json() for row in rows]})
        return
    from rich.table import Table

    occurring = [name for name, value in rows[0].iou.items() if value is not None]
    images = rows[0].protocol["val_images"]
    grid = Table(title=f"Segmentation: {images:,} images, {len(occurring)} classes")
    for heading in ("features", "classifier", "mean IoU", "pixel accuracy"):
        grid.add_column(heading, justify="right" if heading in ("mean IoU", "pixel accuracy") else "left")
    for row in rows:
        grid.add_row(row.features, row.classifier, f"{row.mean_iou:.1%}", f"{row.pixel_accuracy:.1%}")
    results.print(grid)
    by_class = Table(title="IoU by class")
    by_class.add_column("class", overflow="fold")
    for row in rows:
        by_class.add_column(f"{row.classifier}, {row.features}", justify="right")
    for name in occurring:
        by_class.add_row(foreign(name), *(f"{row.iou[name] or 0:.1%}" for row in rows))
    results.print(by_class)
