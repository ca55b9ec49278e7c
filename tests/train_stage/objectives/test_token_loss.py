"""The chunked loss equals PyTorch's cross-entropy of a linear head, in value and gradients."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.train_stage.objectives.token_loss import cross_entropy_and_grads, token_loss
from torch import nn
from torch.nn.functional import cross_entropy


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 7),
    codes=st.integers(1, 9),
    chunk=st.none() | st.integers(1, 30),
    scale=st.floats(0.1, 3),
)
def test_any_chunk_gives_the_loss_the_hits_and_the_gradients_of_all_logits_at_once(batch, rows, codes, chunk, scale):
    torch.manual_seed(0)
    hidden, head = torch.randn(batch, rows, 5, requires_grad=True), nn.Linear(5, codes)
    targets = torch.randint(codes, (batch, rows))
    inputs = [hidden, head.weight, head.bias]
    loss, hits = token_loss(hidden, head, targets, chunk)
    logits = head(hidden)
    expected = cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.equal(hits, logits.argmax(-1) == targets)
    actual, wanted = (torch.autograd.grad(value * scale, inputs) for value in (loss, expected))
    for one, other in zip(actual, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same(dtype: torch.dtype):
    torch.manual_seed(0)
    logits, truth = torch.randn(13, 300, dtype=dtype) * 4, torch.randint(300, (13, 1))
    truth[0] = logits[0].argmax()
    compiled = torch.compile(cross_entropy_and_grads)
    for rows in (13, 5):  # the last chunk is smaller
        actual, wanted = (one(logits[:rows], truth[:rows], 40) for one in (compiled, cross_entropy_and_grads))
        for one, other in zip(actual, wanted, strict=True):
            assert one.dtype == other.dtype
            assert torch.allclose(one.float(), other.float(), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert wanted[1][0]


def test_no_more_logits_exist_than_a_chunk_has():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    hidden, head, targets = torch.randn(64, 5, requires_grad=True), nn.Linear(5, 100), torch.randint(100, (64,))
    largest = {}
    for chunk in (8, None):
        with Largest() as mode:
            token_loss(hidden, head, targets, chunk)[0].backward()
        largest[chunk] = mode.numbers
    assert largest == {8: 8 * 100, None: 64 * 100}


@pytest.mark.parametrize("chunk", [None, 3])
def test_under_autocast_only_the_head_is_in_bfloat16(chunk: int | None):
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(16, 8, requires_grad=True), nn.Linear(8, 20), torch.randint(20, (16,))
    plain, _ = token_loss(hidden, head, targets, chunk)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = token_loss(hidden, head, targets, chunk)
    loss.backward()
    assert loss.dtype == head.weight.grad.dtype == hidden.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=2e-2)
    assert loss.item() != plain.item()
