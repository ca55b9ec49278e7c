"""Opens a fine-tuned classifier, with a name for each of its outputs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...shared.errors import DataError, UsageError
from ...shared.labels.class_names import read_class_names
from ...shared.runtime.console import say
from ..weights.read import load_weights
from ..weights.weights import Weights

_NAMED = 3
"""How many outputs a message names."""


def load_classifier(path: str | Path) -> Weights:
    """The weights of a classifier. Raises DataError as `load_weights` does, and for weights without a head."""
    weights = load_weights(path)
    if weights.kind != "classifier":
        raise DataError(
            f"{weights.file} is pre-trained and has no head; make a classifier of it with mapet train finetune, or "
            "measure its features with mapet train probe."
        )
    return weights


def is_numbered(weights: Weights) -> bool:
    """Whether the outputs have no names but their numbers."""
    return weights.output_names == tuple(map(str, range(weights.classes)))


def with_output_names(weights: Weights, classes: str | Path | None) -> Weights:
    """A classifier whose numbered outputs have the names in the file `classes`: line i, from 0, is that of output i.

    Raises UsageError if the weights carry names, DataError for a list that cannot be read or is not one name for each
    output.
    """
    if classes is None:
        if weights.class_names is None:
            say(
                f"{weights.file} carries no class names: its outputs are called by their numbers, 0 to "
                f"{weights.classes - 1}; --classes FILE names them."
            )
        return weights
    if not is_numbered(weights):
        raise UsageError(
            f"--classes {classes}: the outputs of {weights.file} have names already "
            f"({some_names(weights.output_names)}); leave it out."
        )
    names = read_class_names(Path(classes))
    if len(names) != weights.classes:
        raise DataError(
            f"{classes} names {len(names):,} classes and {weights.file} has {weights.classes:,} outputs; give one name "
            "a line for each output, in their order."
        )
    return replace(weights, class_names=tuple(names))


def some_names(names: Sequence[str]) -> str:
    """The first few names in their order, for a message."""
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
