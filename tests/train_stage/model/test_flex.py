"""FlexAttention sees the keys that the windows give, and has their gradients, in every layout.

PyTorch generates no backward kernel for the CPU; here its own reference, which a GPU's kernel is held against, computes
both passes. benchmarks/gpu_check.py tests the kernel.
"""

import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.train_stage.model.attention import Window, attend, make_pattern
from mapet.train_stage.model.layout import Layout
from mapet.train_stage.model.mapet import MaPeT
from mapet.train_stage.model.shape import Shape
from mapet.train_stage.objectives.layouts import make_layout
from torch import Tensor
from torch.nn.attention import flex_attention

HEADS, DIM, PATCHES = 2, 32, 9


@pytest.fixture
def backward_on_cpu(monkeypatch):
    """Lifts PyTorch's refusal of a backward pass on the CPU, which its reference has."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)


def gradients(model: MaPeT, images: Tensor, order: Tensor, layout: Layout) -> dict[str, Tensor]:
    model.zero_grad()
    model(images, order, layout).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


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


def small_model() -> tuple[MaPeT, Tensor, Tensor]:
    """A model of three blocks, two images and their permutations."""
    torch.manual_seed(0)
    model = MaPeT(Shape(DIM, depth=3, heads=HEADS, patch_size=4, image_size=12, k=5))
    return model, torch.randn(2, 3, 12, 12), torch.stack([torch.randperm(PATCHES) for _ in range(2)])


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("ranks", [None, (1, 2, 5)])
@pytest.mark.parametrize("visible", [0, 3])
@pytest.mark.parametrize("objective", ["mapet", "pim"])
def test_gradients_are_those_of_windows(objective: str, visible: int, ranks: tuple[int, ...] | None):
    model, images, order = small_model()
    expected = gradients(model, images, order, make_layout(objective, PATCHES, visible, ranks))
    with torch.compiler.set_stance("force_eager"):  # no kernel is generated
        found = gradients(model, images, order, make_layout(objective, PATCHES, visible, ranks, flex=True))
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.campaign
@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_have_the_same_gradients_with_one_layout_after_another(checkpointing: bool):
    model, images, order = small_model()
    model.grad_checkpointing = checkpointing
    expected = [gradients(model, images, order, make_layout("mapet", PATCHES, visible)) for visible in (3, 4, 5)]
    for block in model.blocks:
        block.compile(backend="aot_eager")  # traced and differentiated, and computed by the reference
    for visible, wanted in zip((3, 4, 5), expected, strict=True):
        found = gradients(model, images, order, make_layout("mapet", PATCHES, visible, flex=True))
        for name, gradient in wanted.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name


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
