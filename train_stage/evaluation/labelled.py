"""Labelled images for an evaluation."""

from collections.abc import Sequence
from pathlib import Path

from ...shared.errors import DataError
from ...shared.images.records import ImageRecord
from ...shared.images.sources import read_records
from ...shared.randomness import generator


def seeded_subset(records: list[ImageRecord], size: int) -> list[ImageRecord]:
    """At most `size` of the records, drawn by key, in their order."""
    drawn = sorted(range(len(records)), key=lambda at: generator("probe", records[at].key).random())[:size]
    return [records[at] for at in sorted(drawn)]


def labelled_images(source: str | Path | Sequence[str | Path]) -> list[ImageRecord]:
    records = read_records(source)
    unlabelled = sum(record.label is None for record in records)
    if unlabelled:
        raise DataError(
            f"{unlabelled} of the {len(records)} images in {source} have no label; a probe needs .cls members in tars, "
            "or class folders."
        )
    return records
