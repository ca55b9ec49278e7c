"""Labelled images for an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...shared.errors import DataError
from ...shared.randomness import generator
from ...shared.sources.options import DEFAULT, SourceOptions
from ...shared.sources.records import ImageRecord
from ...shared.sources.sources import read_records


@dataclass(frozen=True)
class LabelledImages:
    """Images in the order of their source, each with a class label."""

    records: Sequence[ImageRecord]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> Tensor:
        """(n,) int64, on the CPU."""
        return torch.tensor([record.label for record in self.records])

    def subset(self, size: int) -> "LabelledImages":
        """At most `size` of the images, drawn by key and kept in their order."""
        drawn = sorted(range(len(self)), key=lambda index: generator("probe", self.records[index].key).random())[:size]
        return LabelledImages([self.records[index] for index in sorted(drawn)])


def labelled_images(source: str | Path | Sequence[str | Path], options: SourceOptions = DEFAULT) -> LabelledImages:
    """The images of a source that `sources.open_source` opens with these options.

    Raises:
        DataError if the source cannot be read or any of its images has no label.
    """
    records = read_records(source, options=options)
    unlabelled = sum(record.label is None for record in records)
    if unlabelled:
        raise DataError(
            f"{unlabelled} of the {len(records)} images in {source} have no label; a probe needs .cls members in tars, "
            "or class folders."
        )
    return LabelledImages(records)
