"""Which patches predict which: MaPeT (masked and permuted), PIM (permuted) and MIM (masked, BEiT), on one model.

The attention table of each objective is a `Layout`. In MaPeT every row attends to one unbroken window of N + 1 keys if
the keys are ordered as auxiliary rows by rank, class token and visible patches, other patches by rank: patch t attends
to the auxiliary rows above t and the patches up to t. So the attention of a slice of rows costs little more than its
window.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ...shared.errors import UsageError
from ...shared.randomness import generator
from ..model.attention import Window
from ..model.layout import Layout
from ..settings import OBJECTIVES, ObjectiveSettings
from .layout_cache import LayoutCache

SLICES = 2
"""Into how many windows the rows of a band are split; measured on the CPU, changes speed only."""
CACHE = LayoutCache(64 << 20)
"""The layouts that `make_layout` made last: at most 64 MiB of masks, on all devices together. With 196 patches that is
about 200 layouts on a GPU, more than a schedule of `visible` has."""


def step_layout(
    settings: ObjectiveSettings,
    patches: int,
    seed: int,
    step: int,
    steps: int,
    device: torch.device | str,
    *,
    flex: bool = False,
) -> Layout:
    """The layout of step `step` of `steps`. Whatever is drawn for it is a pure function of (seed, step)."""
    if settings.name == "mim":
        return make_layout("mim", patches, patches - settings.masked(patches), device=device)
    visible = _visible(settings, seed, step, steps)
    ranks = _query_ranks(settings, patches - visible, seed, step)
    return make_layout(settings.name, patches, visible, ranks, device=device, flex=flex)


def _visible(settings: ObjectiveSettings, seed: int, step: int, steps: int) -> int:
    """How many patches are visible in a step; in the steps after the last one, which extend a run, as many as in it."""
    start, end = settings.visible, settings.visible_to
    if end is None:
        return start
    if settings.visible_change == "random":
        return int(generator(seed, "visible", step).integers(min(start, end), max(start, end), endpoint=True))
    return round(start + (end - start) * min(step, steps - 1) / max(steps - 1, 1))


def _query_ranks(settings: ObjectiveSettings, predicted: int, seed: int, step: int) -> tuple[int, ...] | None:
    """The ranks that get a query row in a step; None for all `predicted` ones."""
    rows = settings.query_rows
    if rows is None or rows >= predicted:
        return None
    if settings.query_choice == "last":
        return tuple(range(predicted - rows, predicted))
    return tuple(sorted(generator(seed, "query rows", step).choice(predicted, rows, replace=False).tolist()))


def make_layout(
    objective: str,
    patches: int,
    visible: int,
    ranks: tuple[int, ...] | None = None,
    *,
    slices: int = SLICES,
    device: torch.device | str = "cpu",
    flex: bool = False,
) -> Layout:
    """The rows and the attention of an objective. Layouts that were made before come from `CACHE`.

    Args:
        objective: "mapet", "pim" or "mim".
        patches: N, the number of patches of an image.
        visible: how many of them are visible; the others are predicted.
        ranks: which of the ranks 0 .. patches - visible - 1 are predicted, ascending; default all. "mim" predicts all.
        slices: into how many windows the rows of a band are split.
        device: where the masks are.
        flex: whether FlexAttention computes the attention.

    Raises:
        UsageError for an unknown objective, a rank out of range, or if `visible` leaves nothing to predict.
    """
    device = torch.device(device)
    key = (objective, patches, visible, ranks, slices, device, flex)
    return CACHE.get(key, lambda: replace(_build_layout(objective, patches, visible, ranks, slices, device), flex=flex))


def _build_layout(
    objective: str, patches: int, visible: int, ranks: tuple[int, ...] | None, slices: int, device: torch.device
) -> Layout:
    if objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r} is unknown; choose from {', '.join(OBJECTIVES)}.")
    if not 0 <= visible < patches:
        raise UsageError(f"visible {visible} must be at least 0 and less than the {patches} patches of an image.")
    predicted = patches - visible
    rank_tensor = _checked(range(predicted) if ranks is None else ranks, predicted)
    if objective == "mim":
        rows = 1 + patches
        content_windows, predicted_windows = [_everything(rows, rows)], [_everything(predicted, rows)]
    else:
        auxiliary = int(objective == "mapet")
        content_windows = _content_windows(auxiliary, visible, predicted, slices, device)
        # Over all keys, so that ranks drawn anew for every step have one shape, which torch.compile needs.
        over_all_keys = ranks is not None
        predicted_windows = _query_windows(auxiliary, visible, predicted, rank_tensor, over_all_keys, slices, device)
    return Layout(
        visible=visible,
        auxiliary=objective == "mapet",
        patches=objective != "mim",
        queries=objective != "mim",
        ranks=rank_tensor.to(device),
        rank_numbers=tuple(rank_tensor.tolist()),
        content_windows=tuple(content_windows),
        predicted_windows=tuple(predicted_windows),
    )


def _checked(ranks: Sequence[int], predicted: int) -> Tensor:
    tensor = torch.tensor(ranks)
    if not len(tensor) or tensor[0] < 0 or tensor[-1] >= predicted or (tensor.diff() <= 0).any():
        raise UsageError(f"ranks must be one or more of 0 to {predicted - 1}, ascending.")
    return tensor


# Keys: auxiliary rows by rank, class token and visible patches, other patches by rank. PIM (`auxiliary` is 0, not 1) is
# the same without the first of these.
def _content_windows(auxiliary: int, visible: int, predicted: int, slices: int, device: torch.device) -> list[Window]:
    """What the content rows attend to: the unordered ones to each other, a patch of rank t also to ranks up to t."""
    unordered = auxiliary * predicted + 1 + visible
    rank = torch.arange(predicted)
    by_rank = _band(auxiliary * (rank + 1), unordered + rank + 1, slices, device)
    return [_everything(unordered, unordered), *(_moved(window, unordered) for window in by_rank)]


def _query_windows(
    auxiliary: int, visible: int, predicted: int, ranks: Tensor, over_all_keys: bool, slices: int, device: torch.device
) -> list[Window]:
    """What the query rows attend to; `over_all_keys` gives one window that does not depend on the ranks."""
    unordered = auxiliary * predicted + 1 + visible
    if over_all_keys:
        rows = slice(0, len(ranks))
        return [_window(rows, auxiliary * ranks, unordered + ranks, 0, unordered + predicted, device)]
    return _band(auxiliary * ranks, unordered + ranks, slices, device)


def _everything(rows: int, keys: int) -> Window:
    return Window(slice(0, rows), slice(0, keys))


def _band(starts: Tensor, stops: Tensor, slices: int, device: torch.device) -> list[Window]:
    """Windows in which row i attends to the keys starts[i] to stops[i] - 1; starts and stops never decrease."""
    edges = torch.linspace(0, len(starts), min(slices, len(starts)) + 1).round().int().tolist()
    return [
        _window(slice(low, high), starts[low:high], stops[low:high], int(starts[low]), int(stops[high - 1]), device)
        for low, high in pairwise(edges)
    ]


def _window(rows: slice, starts: Tensor, stops: Tensor, first: int, last: int, device: torch.device) -> Window:
    """One window over the keys first to last - 1, in which row i attends to the keys starts[i] to stops[i] - 1."""
    key = torch.arange(first, last)
    mask = (key >= starts[:, None]) & (key < stops[:, None])
    return Window(rows, slice(first, last), None if mask.all() else mask.to(device))


def _moved(window: Window, by: int) -> Window:
    """The window with its rows moved."""
    return Window(slice(window.rows.start + by, window.rows.stop + by), window.keys, window.mask)
