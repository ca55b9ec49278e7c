"""Attention in windows is softmax attention under a mask, forward and backward, on every path."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mapet.train_stage.model import attention
from mapet.train_stage.model.attention import Window, attend, make_pattern
from torch import Tensor

HEADS, DIM = 2, 12


def dense(streams: list[Tensor], keys_values: Tensor, windows: list[list[Window]]) -> list[Tensor]:
    """Softmax attention written out, under one mask of all rows and keys per stream."""
    keys, values = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in keys_values.chunk(2, dim=-1))
    outputs = []
    for rows, stream_windows in zip(streams, windows, strict=True):
        mask = torch.zeros(rows.shape[1], keys.shape[2], dtype=torch.bool)
        for window in stream_windows:
            mask[window.rows, window.keys] = True if window.mask is None else window.mask
        queries = rows.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        scores = queries @ keys.transpose(-2, -1) / (DIM // HEADS) ** 0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        outputs.append((weights @ values).transpose(1, 2).flatten(2))
    return outputs


@st.composite
def banded_rows(draw, keys: int) -> tuple[int, list[Window]]:
    """(rows, windows) that cover them: each window a range of keys, with or without a mask."""
    windows, top = [], 0
    for _ in range(draw(st.integers(1, 3))):
        rows, first = draw(st.integers(1, 4)), draw(st.integers(0, keys - 1))
        last = draw(st.integers(first + 1, keys))
        mask = None
        if draw(st.booleans()):
            mask = torch.tensor(
                draw(st.lists(st.booleans(), min_size=rows * (last - first), max_size=rows * (last - first)))
            )
            mask = mask.view(rows, last - first)
            mask[:, 0] = True  # a row that attends to nothing has no softmax
        windows.append(Window(slice(top, top + rows), slice(first, last), mask))
        top += rows
    return top, windows


@pytest.fixture(params=["by windows", "under one mask"])
def way(request, monkeypatch) -> str:
    """How attention is computed: as on the CPU, or as on other devices."""
    if request.param != "by windows":
        monkeypatch.setattr(attention, "_BY_WINDOWS", ())
    return request.param


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), keys=st.integers(1, 7), count=st.integers(1, 2))
def test_windows_give_the_attention_of_their_dense_mask_and_its_gradients(way, data, keys: int, count: int):
    torch.manual_seed(0)
    drawn = [data.draw(banded_rows(keys)) for _ in range(count)]
    windows = [windows for _, windows in drawn]
    inputs = [torch.randn(2, rows, DIM, requires_grad=True) for rows, _ in drawn]
    keys_values = torch.randn(2, keys, 2 * DIM, requires_grad=True)
    pattern = make_pattern(windows, keys, "cpu")
    actual, expected = attend(inputs, keys_values, HEADS, pattern), dense(inputs, keys_values, windows)
    weights = [torch.randn_like(output) for output in expected]
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    for one, other in zip(
        *(
            torch.autograd.grad(outputs, [*inputs, keys_values], weights, retain_graph=True)
            for outputs in (actual, expected)
        ),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-4)


def test_no_mask_is_made_if_every_row_attends_to_every_key(way):
    everything = [[Window(slice(0, 3), slice(0, 5)), Window(slice(3, 7), slice(0, 5))]]
    assert make_pattern(everything, 5, "cpu").mask is None
    assert (make_pattern(everything, 6, "cpu").mask is None) == (way == "by windows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_of_other_devices_equals_that_of_the_cpu(monkeypatch, dtype: torch.dtype):
    torch.manual_seed(0)
    mask = torch.ones(4, 7, dtype=torch.bool).tril(2)
    windows = [[Window(slice(0, 3), slice(0, 5)), Window(slice(3, 7), slice(1, 8), mask)]]
    rows, keys_values = torch.randn(2, 7, DIM, dtype=dtype), torch.randn(2, 8, 2 * DIM, dtype=dtype)
    on_cpu = attend([rows], keys_values, HEADS, make_pattern(windows, 8, "cpu"))[0]
    monkeypatch.setattr(attention, "_BY_WINDOWS", ())
    elsewhere = attend([rows], keys_values, HEADS, make_pattern(windows, 8, "cpu"))[0]
    assert on_cpu.dtype == elsewhere.dtype == dtype
    assert torch.allclose(on_cpu, elsewhere, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_the_output_is_laid_out_for_the_projection_without_a_copy():
    everything = Window(slice(0, 5), slice(0, 5))
    rows, keys_values = torch.randn(2, 5, DIM, requires_grad=True), torch.randn(2, 5, 2 * DIM)
    (output,) = attend([rows], keys_values, HEADS, make_pattern([[everything]], 5, "cpu"))
    assert output.is_contiguous()
    assert output._base is not None
