"""What a probe measured, and the tables that show it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from ...shared.runtime.console import foreign, results
from ..evaluation.base import EvaluationResult
from ..evaluation.embed import FrozenFeatures
from .best_block import BlockChoice
from .low_shot import LOW_SHOT


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 accuracies in [0, 1] on the validation images."""

    features: str
    """Whose features: "pre-trained", "random init" or "pixels 32x32"."""
    linear: float
    knn: float
    evaluations: tuple[EvaluationResult, ...] = ()
    """The same with the protocol of each evaluation."""
    attentive: float | None = None
    """None if it was not measured."""
    low_shot: Mapping[str, float] = field(default_factory=dict)
    """By the share of labels, such as "1%"."""
    rankme: float | None = None
    """Effective rank of the features; None if it was not measured."""
    block: int | None = None
    """The block of the model whose features were measured, from 0; None of pixels."""
    choice: BlockChoice | None = None
    """How the block was chosen; None if it was given."""

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured, with its protocols, as plain JSON values."""
        return {
            "features": self.features,
            "block": self.block,
            "block_choice": self.choice and self.choice.to_json(),
            "evaluations": [result.to_json() for result in self.evaluations],
        }

    @classmethod
    def of(
        cls, features: FrozenFeatures, measured: Sequence[EvaluationResult], choices: Mapping[str, BlockChoice]
    ) -> "ProbeResult":
        """The result for one encoder; `choices` are those of blocks by the encoder's name."""
        numbers = {result.name: result.numbers for result in measured}
        low_shot = [name for name in numbers if name.startswith(LOW_SHOT)]
        return cls(
            features.encoder,
            numbers["linear"]["top1"],
            numbers["knn"]["top1"],
            tuple(measured),
            numbers["attentive"]["top1"] if "attentive" in numbers else None,
            {name.removeprefix(LOW_SHOT): numbers[name]["top1"] for name in low_shot},
            numbers["rankme"]["effective_rank"] if "rankme" in numbers else None,
            features.block,
            choices.get(features.encoder),
        )


def show_tables(rows: Sequence[ProbeResult]) -> None:
    """Prints the accuracies, those of k-NN by number of neighbours, and those by block if one was chosen."""
    measured = rows[0].evaluations[0].protocol["features"]
    title = f"Frozen features: top-1 on {measured['val_images']:,} images of {measured['val_classes']} classes"
    _print(title, _columns(rows[0]), [(row.features, _cells(row)) for row in rows])
    _show_neighbours(rows)
    choices = [row.choice for row in rows if row.choice]
    if choices:
        _show_blocks([row for row in rows if row.choice], choices)


def _columns(row: ProbeResult) -> list[str]:
    attentive = ["attentive probe"] if row.attentive is not None else []
    low_shot = [f"{share} of labels" for share in row.low_shot]
    return ["linear probe", *attentive, "k-NN", *low_shot, *(["RankMe"] if row.rankme is not None else [])]


def _cells(row: ProbeResult) -> list[str]:
    accuracies = [row.linear, *([] if row.attentive is None else [row.attentive]), row.knn, *row.low_shot.values()]
    return [*map(_percent, accuracies), *([] if row.rankme is None else [f"{row.rankme:.1f}"])]


def _show_neighbours(rows: Sequence[ProbeResult]) -> None:
    compared = [
        (f"{row.features}, {'' if result.name == 'knn' else 'not '}centred", result)
        for row in rows
        for result in row.evaluations
        if "compared" in result.protocol
    ]
    if compared:
        ks = compared[0][1].protocol["compared"]["ks"]
        names = [*(f"top1_k{k}" for k in ks), "top1_chosen_k"]
        cells = [
            (name, [*(_percent(result.numbers[of]) for of in names), str(result.protocol["compared"]["chosen_k"])])
            for name, result in compared
        ]
        _print("k-NN by number of neighbours", [*(f"k = {k}" for k in ks), "chosen k", "k"], cells)


def _show_blocks(rows: Sequence[ProbeResult], choices: Sequence[BlockChoice]) -> None:
    cells = [
        (str(block), [_percent(choice.held_out_top1[block]) + " *" * (choice.block == block) for choice in choices])
        for block in range(len(choices[0].held_out_top1))
    ]
    title = "Blocks: linear probe on a tenth of the training images (* chosen)"
    _print(title, [row.features for row in rows], cells, first="block")


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _print(
    title: str, columns: Iterable[str], rows: Iterable[tuple[str, Sequence[str]]], first: str = "features"
) -> None:
    grid = Table(title=title)
    grid.add_column(first)
    for column in columns:
        grid.add_column(column, justify="right")
    for name, cells in rows:
        grid.add_row(foreign(name), *cells)
    results.print(grid)
