"""Layouts are the tables of the paper, and what a step draws depends on (seed, step) alone."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import UsageError
from mapet.train_stage.model import attention
from mapet.train_stage.model.attention import Window
from mapet.train_stage.model.layout import Layout
from mapet.train_stage.model.mapet import MaPeT
from mapet.train_stage.model.shape import Shape
from mapet.train_stage.objectives.layout_cache import LayoutCache
from mapet.train_stage.objectives.layouts import CACHE, make_layout, step_layout
from mapet.train_stage.objectives.token_loss import token_loss
from mapet.train_stage.settings import OBJECTIVES, ObjectiveSettings, resolve

PATCHES, STEPS = 64, 100


def dense_mask(windows: tuple[Window, ...], keys: int) -> torch.Tensor:
    """The windows as one dense mask (rows, keys)."""
    mask = torch.zeros(windows[-1].rows.stop, keys, dtype=torch.bool)
    for window in windows:
        mask[window.rows, window.keys] = True if window.mask is None else window.mask
    return mask


@given(visible=st.integers(0, 8), predicted=st.integers(1, 9), slices=st.integers(1, 12))
def test_every_row_of_mapet_attends_to_each_position_exactly_once(visible: int, predicted: int, slices: int):
    layout = make_layout("mapet", visible + predicted, visible, slices=slices)
    keys = 1 + visible + 2 * predicted
    content, queries = dense_mask(layout.content_windows, keys), dense_mask(layout.predicted_windows, keys)
    given_keys = slice(predicted, predicted + 1 + visible)
    for rows in (content, queries):
        auxiliary, patches = rows[:, :predicted], rows[:, predicted + 1 + visible :]
        assert rows[:, given_keys].all()
        assert (auxiliary ^ patches).all()
    rank = torch.arange(predicted)
    ordered = content[predicted + 1 + visible :]
    assert torch.equal(ordered[:, predicted + 1 + visible :], rank[None] <= rank[:, None])
    assert torch.equal(queries[:, predicted + 1 + visible :], rank[None] < rank[:, None])


@given(visible=st.integers(0, 8), predicted=st.integers(1, 9), slices=st.integers(1, 12))
def test_pim_is_mapet_without_auxiliary_rows(visible: int, predicted: int, slices: int):
    permuted, both = (make_layout(name, visible + predicted, visible, slices=slices) for name in ("pim", "mapet"))
    keys = 1 + visible + predicted
    for name in ("content_windows", "predicted_windows"):
        one, other = dense_mask(getattr(permuted, name), keys), dense_mask(getattr(both, name), keys + predicted)
        assert torch.equal(one, other[-len(one) :, predicted:])


@cache
def resolved(**objective: object) -> ObjectiveSettings:
    overrides = [f"objective.{name}={value}" for name, value in objective.items()]
    return resolve(None, ["model.image_size=64", "model.patch_size=8", *overrides]).objective


def drawn(step: int, seed: int = 0, **objective) -> tuple[int, list[int]]:
    layout = step_layout(resolved(**objective), PATCHES, seed, step, STEPS, "cpu")
    return layout.visible, layout.ranks.tolist()


def test_visible_is_a_value_a_schedule_or_a_range():
    assert {drawn(step)[0] for step in range(STEPS)} == {16}
    schedule = [drawn(step, visible=48, visible_to=8)[0] for step in range(STEPS)]
    assert (schedule[0], schedule[-1]) == (48, 8)
    assert drawn(2 * STEPS, visible=48, visible_to=8)[0] == 8  # of an extended run
    assert (np.diff(schedule) <= 0).all()
    drawings = [drawn(step, visible=10, visible_to=13, visible_change="random")[0] for step in range(STEPS)]
    assert set(drawings) == {10, 11, 12, 13}
    assert drawings == [drawn(step, visible=13, visible_to=10, visible_change="random")[0] for step in range(STEPS)]
    assert drawings != [drawn(step, 1, visible=10, visible_to=13, visible_change="random")[0] for step in range(STEPS)]


def test_query_rows_are_all_the_last_or_drawn():
    assert drawn(0)[1] == list(range(48))
    assert drawn(0, query_rows=5, query_choice="last")[1] == [43, 44, 45, 46, 47]
    assert drawn(0, query_rows=50)[1] == list(range(48))
    drawings = [drawn(step, query_rows=5)[1] for step in range(STEPS)]
    assert drawings == [drawn(step, query_rows=5)[1] for step in range(STEPS)]
    assert all(len(set(ranks)) == 5 and ranks == sorted(ranks) for ranks in drawings)
    assert {rank for ranks in drawings for rank in ranks} == set(range(48))


def test_the_loss_over_drawn_ranks_is_an_unbiased_estimate_of_the_whole():
    """The mean over every single rank, each equally likely to be drawn, is the loss of all ranks."""
    torch.manual_seed(0)
    model = MaPeT(Shape(dim=12, depth=2, heads=2, patch_size=4, image_size=16, k=5))
    images, order, tokens = torch.randn(2, 3, 16, 16), torch.stack([torch.randperm(16)] * 2), torch.randint(5, (2, 16))

    def loss(ranks: tuple[int, ...] | None) -> float:
        layout = make_layout("mapet", 16, 4, ranks)
        targets = tokens.gather(1, order)[:, 4:][:, layout.ranks]
        return token_loss(model.predict_rows(images, order, layout), model.decoder, targets)[0].item()

    assert np.mean([loss((rank,)) for rank in range(12)]) == pytest.approx(loss(None), rel=1e-5)


def test_masked_image_modelling_predicts_its_share_whatever_the_other_settings():
    for objective in ({}, {"visible": 3, "query_rows": 2}):
        visible, ranks = drawn(0, name="mim", **objective)
        assert (visible, len(ranks)) == (64 - 26, 26)


@settings(max_examples=20)
@given(step=st.integers(0, STEPS - 1))
def test_layouts_of_drawn_ranks_have_one_shape(step: int):
    """So that torch.compile compiles once."""
    objective = resolved(query_rows=5)
    one, other = (step_layout(objective, PATCHES, 0, s, STEPS, "cpu").predicted_windows for s in (0, step))
    assert [(w.rows, w.keys, w.mask.shape) for w in one] == [(w.rows, w.keys, w.mask.shape) for w in other]


def masks(layout: Layout) -> dict[int, torch.Tensor]:
    """Every mask that a layout holds, patterns included, by identity."""
    windows = (*layout.content_windows, *layout.predicted_windows)
    candidates = [*(window.mask for window in windows), layout.pattern.mask, layout.last_pattern.mask]
    return {id(mask): mask for mask in candidates if mask is not None}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("ranks", [None, (1, 5, 30)])
def test_a_layouts_size_is_no_less_than_that_of_its_masks(
    objective: str, ranks: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
):
    on_cpu = make_layout(objective, PATCHES, 16, ranks)
    assert on_cpu.nbytes == on_cpu.ranks.nbytes + sum(mask.nbytes for mask in masks(on_cpu).values())
    monkeypatch.setattr(attention, "_BY_WINDOWS", ())
    elsewhere = make_layout(objective, PATCHES, 16, ranks, device="meta")  # a device on which nothing is computed
    assert elsewhere.ranks.nbytes + sum(mask.nbytes for mask in masks(elsewhere).values()) <= elsewhere.nbytes


def test_layouts_are_made_once_and_kept_in_bounded_memory():
    CACHE.clear()
    first = make_layout("mapet", 196, 49)
    assert make_layout("mapet", 196, 49) is first
    limit, CACHE.limit = CACHE.limit, 20 * first.nbytes
    try:
        for rank in range(147):
            make_layout("mapet", 196, 49, (rank,))
            assert make_layout("mapet", 196, 49) is first  # in use, so it stays
            assert CACHE.nbytes <= CACHE.limit
        assert 2 < len(CACHE) < 147
    finally:
        CACHE.limit = limit
    assert limit == 64 * 2**20


def test_the_cache_drops_what_was_used_least_recently_and_keeps_the_newest():
    one, two, three = (make_layout("pim", PATCHES, visible) for visible in (20, 21, 22))
    cache = LayoutCache(one.nbytes + two.nbytes)
    made: list[str] = []

    def get(name: str, layout: Layout) -> Layout:
        return cache.get(name, lambda: made.append(name) or layout)

    get("one", one), get("two", two), get("one", one), get("three", three)
    assert get("one", one) is one
    assert made == ["one", "two", "three"]
    get("two", two)
    assert made == ["one", "two", "three", "two"]
    cache.limit = 1
    assert get("large", three) is three
    assert get("large", three) is three
    assert (len(cache), made[4:]) == (1, ["large"])
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_layout_that_is_refused_is_not_kept():
    CACHE.clear()
    for _ in range(2):
        with pytest.raises(UsageError):
            make_layout("mapet", 16, 16)
    assert len(CACHE) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mae", 16, 4), "mapet, pim, mim"),
        (("mapet", 16, 16), "visible"),
        (("mapet", 16, -1), "visible"),
        (("mapet", 16, 4, ()), "ranks"),
        (("mapet", 16, 4, (12,)), "ranks"),
        (("mapet", 16, 4, (3, 3)), "ascending"),
    ],
)
def test_impossible_layouts_are_refused(arguments: tuple, words: str):
    with pytest.raises(UsageError, match=words):
        make_layout(*arguments)
