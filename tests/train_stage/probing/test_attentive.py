"""The attentive probe is the published model, trained for a grid at once, and finds what a mean over patches hides."""

import itertools
from dataclasses import replace

import pytest
import torch
from mapet.shared.errors import UsageError
from mapet.train_stage.evaluation.embed import FrozenFeatures
from mapet.train_stage.probing.attentive import AttentiveProbe, Budget, accuracies, train_grid
from mapet.train_stage.probing.attentive_head import AttentiveHead, attention_heads, grid_logits
from mapet.train_stage.probing.linear_probe import LinearProbe
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward


def randomised(dim: int, classes: int, seed: int) -> AttentiveHead:
    """A head whose weights and biases are all large."""
    head = AttentiveHead(dim, classes, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head


@torch.no_grad()
def by_pytorch(head: AttentiveHead, patches: Tensor) -> Tensor:
    """The logits by PyTorch's attention over all keys and values, with a key bias as published."""
    dim = patches.shape[2]
    eye = torch.eye(dim)
    in_proj = torch.cat([eye, head.key.flatten(0, 1), head.value.flatten(0, 1)])
    in_bias = torch.cat([torch.zeros(dim), torch.linspace(-3, 3, dim), head.value_bias])
    attended, _ = multi_head_attention_forward(
        head.query.flatten().expand(1, len(patches), dim),
        patches.transpose(0, 1),
        patches.transpose(0, 1),
        dim,
        len(head.query),
        in_proj,
        in_bias,
        None,
        None,
        False,
        0.0,
        eye,
        torch.zeros(dim),
    )
    return attended[0] @ head.weight.T + head.bias


@pytest.mark.parametrize("dim", [24, 128, 192])
def test_a_head_is_attention_by_one_query_and_a_linear_classifier(dim: int):
    patches = torch.randn(5, 9, dim, generator=torch.Generator().manual_seed(0)) / dim**0.25
    heads = [randomised(dim, 7, seed) for seed in range(3)]
    expected = torch.stack([by_pytorch(head, patches) for head in heads])
    assert torch.allclose(grid_logits(heads, patches), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_heads_have_64_channels_where_64_divides_the_features():
    assert [attention_heads(dim) for dim in (16, 64, 192, 768, 1024)] == [1, 1, 3, 12, 16]
    assert [attention_heads(dim) for dim in (48, 100, 97, 588)] == [1, 1, 1, 7]


def test_a_grid_trained_at_once_equals_each_pair_trained_alone(hidden_signal: FrozenFeatures):
    grid = list(itertools.product((1e-3, 2e-2), (5e-4, 5e-2)))
    images, budget = torch.arange(200), Budget(30, 32)

    def trained(pairs: list[tuple[float, float]]) -> list[AttentiveHead]:
        assert hidden_signal.train_patches is not None
        return train_grid(hidden_signal.train_patches, hidden_signal.train_labels, images, 4, pairs, budget, seed=3)

    together, start = trained(grid), AttentiveHead(16, 4, 3).state_dict()
    for pair, head in zip(grid, together, strict=True):
        (alone,) = trained([pair])
        for name, tensor in alone.state_dict().items():
            assert torch.allclose(tensor, head.state_dict()[name], atol=1e-5), (pair, name)
        assert (head.weight - start["weight"]).abs().max() > 1e-2
    assert (together[2].weight - together[3].weight).abs().max() > 1e-3  # weight decay alone differs


def test_attention_finds_a_class_that_the_mean_over_patches_hides(hidden_signal: FrozenFeatures):
    probe = AttentiveProbe(learning_rates=(4e-3, 2e-2), weight_decays=(5e-4,), iterations=200, batch=128)
    assert probe.measure(hidden_signal).numbers["top1"] > 0.95
    assert LinearProbe().measure(hidden_signal).numbers["top1"] < 0.6


SMALL = AttentiveProbe(learning_rates=(1e-4, 2e-2), weight_decays=(5e-4, 5e-2), iterations=40, batch=64)


def test_the_choice_does_not_depend_on_the_validation_images(hidden_signal: FrozenFeatures):
    shuffled = hidden_signal.val_labels[torch.randperm(400, generator=torch.Generator().manual_seed(2))]
    plain, other = SMALL.measure(hidden_signal), SMALL.measure(replace(hidden_signal, val_labels=shuffled))
    assert plain.protocol == other.protocol
    assert plain.numbers["top1"] > other.numbers["top1"] + 0.1


def test_the_chosen_head_is_the_best_on_the_held_out_tenth_and_the_seed_decides(hidden_signal: FrozenFeatures):
    result = SMALL.measure(hidden_signal)
    scores = {
        (score["learning_rate"], score["weight_decay"]): score["top1"] for score in result.protocol["held_out_top1"]
    }
    assert len(scores) == 4
    chosen = (result.protocol["learning_rate"], result.protocol["weight_decay"])
    assert scores[chosen] == max(scores.values())
    assert SMALL.measure(hidden_signal) == result
    assert replace(SMALL, seed=1).measure(hidden_signal) != result


def test_large_batches_are_computed_in_parts(hidden_signal: FrozenFeatures, monkeypatch: pytest.MonkeyPatch):
    patches, labels = hidden_signal.train_patches, hidden_signal.train_labels
    assert patches is not None

    def trained() -> AttentiveHead:
        return train_grid(patches, labels, torch.arange(100), 4, [(1e-2, 5e-4)], Budget(10, 50), seed=0)[0]

    whole = trained()
    monkeypatch.setattr("mapet.train_stage.probing.attentive._MOST_NUMBERS", 1000)
    in_parts = trained()
    assert torch.allclose(whole.weight, in_parts.weight, atol=1e-5)
    scores = accuracies([whole], patches, labels, torch.arange(1000))
    logits = whole(patches.rows(range(1000)))
    assert scores == [pytest.approx((logits.argmax(1) == labels).float().mean().item())]


def test_the_budget_is_the_published_one_scaled_down_for_small_sets():
    assert Budget.of(1_153_051) == Budget(12_386, 1024)
    assert Budget.of(5_000_000) == Budget(12_500, 1024)
    assert Budget.of(14_400) == Budget(550, 288)
    assert Budget.of(20) == Budget(500, 20)
    assert Budget.of(14_400, iterations=50, batch=512) == Budget(50, 512)


def test_features_without_patches_are_refused(hidden_signal: FrozenFeatures):
    with pytest.raises(UsageError, match="patches=True"):
        AttentiveProbe().measure(replace(hidden_signal, train_patches=None))
