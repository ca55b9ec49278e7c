"""What is predicted from what: MaPeT (masked and permuted), PIM (permuted), MIM (masked, BEiT), on one model.

The table of each objective is a `Layout`. In MaPeT every row sees one unbroken window of N + 1 keys when the keys are
auxiliary rows by rank, class token and visible patches, other patches by rank: patch t sees the auxiliary rows above
t and the patches up to t. So the attention of slices of rows costs little more than the window.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ...shared.errors import UsageError
from ...shared.randomness import generator
from ..model.attention import Window
from ..model.layout import Layout
from ..settings import OBJECTIVES, ObjectiveSettings

SLICES = 2
"""Into how many windows the rows of a band are split; measured on the CPU, changes speed only."""


def step_layout(
    settings: ObjectiveSettings, patches: int, seed: int, step: int, steps: int, device: torch.device | str
) -> Layout:
    """What step `step` of `steps` predicts from what; what is drawn is a pure function of (seed, step)."""
    if settings.name == "mim":
        return make_layout("mim", patches, patches - settings.masked(patches), device=device)
    visible = _visible(settings, seed, step, steps)
    ranks = _query_ranks(settings, patches - visible, seed, step)
    return make_layout(settings.name, patches, visible, ranks, device=device)


def _visible(settings: ObjectiveSettings, seed: int, step: int, steps: int) -> int:
    start, end = settings.visible, settings.visible_to
    if end is None:
        return start
    if settings.visible_change == "random":
        return int(generator(seed, "visible", step).integers(min(start, end), max(start, end), endpoint=True))
    return round(start + (end - start) * step / max(steps - 1, 1))


def _query_ranks(settings: ObjectiveSettings, predicted: int, seed: int, step: int) -> tuple[int, ...] | None:
    rows = settings.query_rows
    if rows is None or rows >= predicted:
        return None
    if settings.query_choice == "last":
        return tuple(range(predicted - rows, predicted))
    return tuple(sorted(generator(seed, "query rows", step).choice(predicted, rows, replace=False).tolist()))


@lru_cache(maxsize=512)
def make_layout(
    objective: str,
    patches: int,
    visible: int,
    ranks: tuple[int, ...] | None = None,
    *,
    slices: int = SLICES,
    device: torch.device | str = "cpu",
) -> Layout:
    """The rows and the attention of an objective, for images of `patches` patches of which `visible` are given.

    Args:
        objective: "mapet", "pim" or "mim".
        ranks: which of the ranks 0 .. patches - visible - 1 are predicted, ascending; default all. "mim" predicts all.
        slices: into how many windows the rows of a band are split.

    Raises UsageError for an unknown objective, a rank out of range, or if `visible` leaves nothing to predict.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r} is unknown; choose from {', '.join(OBJECTIVES)}.")
    if not 0 <= visible < patches:
        raise UsageError(f"visible {visible} must be at least 0 and less than the {patches} patches of an image.")
    given, predicted = 1 + visible, patches - visible
    chosen = _checked(range(predicted) if ranks is None else ranks, predicted)
    if objective == "mim":
        rows = given + predicted
        content, read = [_everything(rows, rows)], [_everything(predicted, rows)]
    else:
        # Keys: auxiliary rows by rank, V, other patches by rank. PIM is the same without the first of these.
        auxiliary = int(objective == "mapet")
        free = given + auxiliary * predicted
        rank = torch.arange(predicted)
        ordered = _band(auxiliary * (rank + 1), free + rank + 1, slices, device)
        content = [_everything(free, free), *(_moved(window, free) for window in ordered)]
        if ranks is None:
            read = _band(auxiliary * chosen, free + chosen, slices, device)
        else:  # over all keys, so that ranks drawn anew for every step have one shape, which torch.compile needs
            every = slice(0, len(chosen))
            read = [_window(every, auxiliary * chosen, free + chosen, 0, free + predicted, device)]
    return Layout(
        visible=visible,
        auxiliary=objective == "mapet",
        patches=objective != "mim",
        queries=objective != "mim",
        ranks=chosen.to(device),
        rank_numbers=tuple(chosen.tolist()),
        content_windows=tuple(content),
        read_windows=tuple(read),
    )


def _checked(ranks: Sequence[int], predicted: int) -> Tensor:
    found = torch.tensor(ranks)
    if not len(found) or found[0] < 0 or found[-1] >= predicted or (found.diff() <= 0).any():
        raise UsageError(f"ranks must be one or more of 0 to {predicted - 1}, ascending.")
    return found


def _everything(rows: int, keys: int) -> Window:
    return Window(slice(0, rows), slice(0, keys))


def _band(starts: Tensor, stops: Tensor, slices: int, device: torch.device | str) -> list[Window]:
    """Windows in which row i sees the keys starts[i] to stops[i] - 1; starts and stops never decrease."""
    edges = torch.linspace(0, len(starts), min(slices, len(starts)) + 1).round().int().tolist()
    return [
        _window(slice(low, high), starts[low:high], stops[low:high], int(starts[low]), int(stops[high - 1]), device)
        for low, high in pairwise(edges)
    ]


def _window(rows: slice, starts: Tensor, stops: Tensor, first: int, last: int, device: torch.device | str) -> Window:
    key = torch.arange(first, last)
    mask = (key >= starts[:, None]) & (key < stops[:, None])
    return Window(rows, slice(first, last), None if mask.all() else mask.to(device))


def _moved(window: Window, by: int) -> Window:
    return Window(slice(window.rows.start + by, window.rows.stop + by), window.keys, window.mask)
