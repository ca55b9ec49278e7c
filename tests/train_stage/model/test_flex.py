"""FlexAttention sees the keys that the windows give, in every layout; its backward pass needs a GPU
(benchmarks/gpu_check.py)."""

import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.train_stage.model.attention import Window, attend, make_pattern
from mapet.train_stage.model.mapet import MaPeT
from mapet.train_stage.model.shape import Shape
from mapet.train_stage.objectives.layouts import make_layout

HEADS, DIM, PATCHES = 2, 32, 9


@pytest.fixture
def uncompiled():
    """FlexAttention's own reference in PyTorch: no kernel is generated."""
    with torch.compiler.set_stance("force_eager"):
        yield


@st.composite
def streams_of_windows(draw, keys: int) -> list[list[Window]]:
    """Windows in which every row attends to one unbroken range of keys."""
    streams = []
    for _ in range(draw(st.integers(1, 2))):
        edges = [0, *draw(st.lists(st.integers(1, 200), min_size=1, max_size=3, unique=True).map(sorted))]
        streams.append([])
        for low, high in pairwise(edges):
            first = draw(st.integers(0, keys - 1))
            last = draw(st.integers(first + 1, keys))
            mask = None
            if draw(st.booleans()):
                starts = torch.tensor(
                    draw(st.lists(st.integers(first, last - 1), min_size=high - low, max_size=high - low))
                )
                stops = torch.tensor([draw(st.integers(int(start) + 1, last)) for start in starts])
                key = torch.arange(first, last)
                mask = (key >= starts[:, None]) & (key < stops[:, None])
            streams[-1].append(Window(slice(low, high), slice(first, last), mask))
    return streams


@settings(max_examples=30, deadline=None)
@given(data=st.data(), keys=st.integers(1, 300))
def test_rows_attend_to_the_keys_of_their_windows(data, keys: int):
    streams = data.draw(streams_of_windows(keys))
    pattern = make_pattern(streams, keys, "cpu", flex=True)
    if pattern.blocks is None:
        assert all(window.mask is None and window.keys == slice(0, keys) for stream in streams for window in stream)
        return
    expected = []
    for windows in streams:
        mask = torch.zeros(windows[-1].rows.stop, keys, dtype=torch.bool)
        for window in windows:
            mask[window.rows, window.keys] = True if window.mask is None else window.mask
        expected.append(mask)
    expected = torch.cat(expected)
    row, key = torch.meshgrid(*map(torch.arange, expected.shape), indexing="ij")
    assert torch.equal(pattern.blocks.mask_mod(row, row, row, key), expected)
    size = pattern.blocks.BLOCK_SIZE
    for block_row, parts in enumerate(expected.split(size[0])):
        for block, part in enumerate(parts.split(size[1], dim=1)):
            assert bool(pattern.blocks.to_dense()[0, 0, block_row, block]) == bool(part.any())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("ranks", [None, (1, 2, 5)])
@pytest.mark.parametrize("visible", [0, 3])
@pytest.mark.parametrize("objective", ["mapet", "pim"])
def test_predictions_are_those_of_windows(objective: str, visible: int, ranks: tuple[int, ...] | None):
    torch.manual_seed(0)
    model = MaPeT(Shape(DIM, depth=2, heads=HEADS, patch_size=4, image_size=12, k=5))
    images, order = torch.randn(2, 3, 12, 12), torch.stack([torch.randperm(PATCHES) for _ in range(2)])
    with torch.no_grad():
        found, expected = (
            model.predict_rows(images, order, make_layout(objective, PATCHES, visible, ranks, flex=flex))
            for flex in (True, False)
        )
    assert torch.allclose(found, expected, atol=1e-5)


def test_mim_has_no_mask_to_compute():
    layout = make_layout("mim", PATCHES, 3, flex=True)
    assert layout.pattern.blocks is None
    assert layout.last_pattern.blocks is None


@pytest.mark.campaign
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_generated_kernel_attends_like_windows():
    torch.manual_seed(0)
    layouts = [make_layout("mapet", 196, 49, flex=flex) for flex in (True, False)]
    rows = [torch.randn(2, count, DIM) for count in (layouts[0].content_rows, layouts[0].predicted_rows)]
    keys_values = torch.randn(2, layouts[0].content_rows, 2 * DIM)
    with torch.no_grad():
        found, expected = (attend(rows, keys_values, HEADS, layout.pattern) for layout in layouts)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
