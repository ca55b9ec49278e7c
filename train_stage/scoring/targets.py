"""The outputs that predictions are made among, and which of them is the class of each image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...shared.errors import DataError
from ...shared.labels.class_names import read_class_names
from ...shared.labels.parsing import Label, parse_label
from ..classification.classes import output_indices, unknown_labels
from ..evaluation.classes import some_classes
from ..weights.weights import Weights
from .classifier import is_numbered, some_names


@dataclass(frozen=True)
class Outputs:
    """Some outputs of a classifier, or all of them, in the order of the head or of a list."""

    weights: Weights
    indices: tuple[int, ...]
    """Their numbers in the head."""
    file: Path | None = None
    """The list that they were read from; None for all outputs."""

    @property
    def names(self) -> tuple[str, ...]:
        """Their class names."""
        return tuple(self.weights.output_names[index] for index in self.indices)


def all_outputs(weights: Weights) -> Outputs:
    """All outputs of a classifier."""
    return Outputs(weights, tuple(range(weights.classes)))


def listed_outputs(weights: Weights, file: str | Path) -> Outputs:
    """The outputs in a list: a text file with the name or the number of one output a line.

    Raises DataError for a list that cannot be read, that names something else than outputs, or one output twice.
    """
    path, names = Path(file), weights.output_names
    positions = {name: position for position, name in enumerate(names)}
    lines = read_class_names(path)
    found = [positions.get(line, _number(line, weights.classes)) for line in lines]
    unknown = [line for line, position in zip(lines, found, strict=True) if position is None]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown):,} of its {len(lines):,} lines are no outputs of {weights.file} "
            f"({some_names(unknown)}); give their names ({some_names(names)}) or numbers from 0 to {len(names) - 1}."
        )
    indices = tuple(position for position in found if position is not None)
    if len(set(indices)) < len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        raise DataError(f"{path} lists output {twice} ({names[twice]}) by its name and by its number; list it once.")
    return Outputs(weights, indices, path)


def _number(line: str, outputs: int) -> int | None:
    label = parse_label(line)
    return label if isinstance(label, int) and 0 <= label < outputs else None


def target_positions(labels: Sequence[Label], outputs: Outputs, place: str) -> Tensor:
    """(n,) int64: the position of each label's class in `outputs`; `place` names the images in messages.

    A class number is the name of an output of that number. Raises DataError for labels that are none of the outputs.
    """
    unknown = unknown_labels(labels, outputs.names)
    if unknown:
        raise DataError(_explained(unknown, set(labels), outputs, place))
    return torch.from_numpy(output_indices(labels, outputs.names))


def _explained(unknown: Sequence[Label], labels: set[Label], outputs: Outputs, place: str) -> str:
    """Why some labels are no outputs, and what to do about it."""
    weights, numbers = outputs.weights, all(isinstance(label, int) for label in labels)
    if numbers and not is_numbered(weights):
        return (
            f"The images in {place} have class numbers ({some_classes(unknown)}) and the outputs of {weights.file} "
            f"have names ({some_names(weights.output_names)}); give --classes FILE with the name of class i in line i, "
            "counted from 0."
        )
    if not numbers and is_numbered(weights):
        return (
            f"The images in {place} have class names ({some_classes(unknown)}) and the outputs of {weights.file} have "
            f"numbers, 0 to {weights.classes - 1}; give --classes FILE with the names of all {weights.classes:,} "
            "outputs, one a line in their order."
        )
    among = f"the {len(outputs.indices):,} outputs in {outputs.file}" if outputs.file else f"those of {weights.file}"
    shifted = numbers and {int(label) - 1 for label in labels} <= set(outputs.indices)
    hint = "; they seem to count from 1, and outputs count from 0" if shifted else ""
    return (
        f"{len(unknown):,} of the {len(labels):,} classes of the images in {place} are not among {among} "
        f"({some_classes(unknown)}){hint}; give images of the classes {some_names(outputs.names)}, or --labels FILE "
        "with the right labels."
    )
