"""MaPeT is exact: against the published implementation, a naive reference, and its own definition."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import UsageError
from mapet.train_stage.interchange import load_published
from mapet.train_stage.model import MaPeT, Shape, attention_pattern, drop_path_keep, drop_path_rates
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm

ORACLE = Path(__file__).parent / "oracle"
SMALL = Shape(dim=24, depth=3, heads=2, patch_size=4, image_size=16, k=11)


def largest_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def expected() -> dict[str, Tensor]:
    return load_file(ORACLE / "pretrain_expected.safetensors")


@pytest.fixture
def published() -> MaPeT:
    return load_published(ORACLE / "pretrain.pth.tar")


@pytest.fixture
def small() -> MaPeT:
    torch.manual_seed(0)
    model = MaPeT(SMALL)
    for parameter in model.parameters():  # away from the start, where LayerScale and biases hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def orders(batch: int, patches: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(patches, generator=generator) for _ in range(batch)])


def test_logits_loss_and_every_gradient_equal_the_published_implementation(published, expected):
    order, visible = expected["order"], int(expected["least_number"]) - 1
    logits = published(expected["images"], order, visible)
    predicted = order[:, visible:]
    raster = predicted.argsort(1)[:, :, None].expand_as(logits)
    loss = cross_entropy(logits.flatten(0, 1), expected["tokens"].gather(1, predicted).flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in published.named_parameters()}
    assert largest_error(logits.gather(1, raster), expected["logits"]) < 1e-5
    assert abs(loss.item() / expected["loss"].item() - 1) < 1e-5
    assert {f"grad.{name}" for name in gradients} == {name for name in expected if name.startswith("grad.")}
    for name, gradient in gradients.items():
        assert largest_error(gradient, expected[f"grad.{name}"]) < 1e-5, name


def naive_logits(model: MaPeT, images: Tensor, order: Tensor, visible: int) -> Tensor:
    """The table of the paper read literally: raster order, a dense mask for each image, every row in every block."""
    weights, shape = dict(model.named_parameters()), model.shape
    logits = []
    for image, permutation in zip(images, order, strict=True):
        patches, rank = shape.patches, {int(patch): t for t, patch in enumerate(permutation[visible:], start=1)}
        position = weights["pos_embed"][0]
        content = model.patch_embed(image[None])[0] + position[1:]
        auxiliary = weights["mask_positional_token"][0] + position[1:]
        masked = [patch for patch in range(patches) if patch in rank]
        rows = [("class", None)] + [("patch", p) for p in range(patches)]
        rows += [("auxiliary", p) for p in masked] + [("query", p) for p in masked]
        start = [weights["cls_token"][0, 0] + position[0]] + [content[p] for p in range(patches)]
        hidden = torch.stack(start + [auxiliary[p] for p in masked] * 2)
        keys = [row for row in rows if row[0] != "query"]
        mask = torch.tensor([[attends(row, key, rank) for key in keys] for row in rows])
        for index in range(shape.depth):
            hidden = naive_block(weights, f"blocks.{index}.", hidden, len(keys), mask, shape.heads)
        hidden = layer_norm(hidden, (shape.dim,), weights["norm.weight"], weights["norm.bias"], 1e-6)
        by_rank = sorted(masked, key=rank.__getitem__)
        queries = hidden[[rows.index(("query", patch)) for patch in by_rank]]
        logits.append(queries @ weights["decoder.weight"].T + weights["decoder.bias"])
    return torch.stack(logits)


def attends(row: tuple, key: tuple, rank: dict[int, int]) -> bool:
    kind, patch = row
    key_kind, key_patch = key
    given = key_kind == "class" or (key_kind == "patch" and key_patch not in rank)
    if kind == "class" or kind == "auxiliary" or (kind == "patch" and patch not in rank):
        return given or key_kind == "auxiliary"
    t = rank[patch]
    if key_kind == "auxiliary":
        return rank[key_patch] > t if kind == "patch" else rank[key_patch] >= t
    return given or (rank[key_patch] <= t if kind == "patch" else rank[key_patch] < t)


def naive_block(weights: dict, prefix: str, rows: Tensor, keys: int, mask: Tensor, heads: int) -> Tensor:
    w = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    dim = rows.shape[1]
    normed = layer_norm(rows, (dim,), w["norm1.weight"], w["norm1.bias"], 1e-6)
    q = (normed @ w["attn.q.weight"].T + w["attn.q.bias"]).view(-1, heads, dim // heads).transpose(0, 1)
    kv = (normed[:keys] @ w["attn.kv.weight"].T + w["attn.kv.bias"]).view(keys, 2, heads, dim // heads)
    k, v = kv[:, 0].transpose(0, 1), kv[:, 1].transpose(0, 1)
    scores = (q @ k.transpose(1, 2)) / (dim // heads) ** 0.5
    attended = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    joined = attended.transpose(0, 1).reshape(-1, dim) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    rows = rows + w["ls1.gamma"] * joined
    normed = layer_norm(rows, (dim,), w["norm2.weight"], w["norm2.bias"], 1e-6)
    hidden = gelu(normed @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
    return rows + w["ls2.gamma"] * (hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])


@pytest.mark.parametrize("visible", [0, 1, 4, 15])
def test_logits_equal_a_naive_dense_mask_implementation(small, visible):
    images, order = torch.randn(2, 3, 16, 16), orders(2, 16)
    assert largest_error(small(images, order, visible), naive_logits(small, images, order, visible)) < 1e-5


@settings(max_examples=15, deadline=None)
@given(rank=st.integers(1, 12), seed=st.integers(0, 1000))
def test_a_prediction_depends_on_earlier_patches_only(rank: int, seed: int):
    torch.manual_seed(seed)
    model, visible = MaPeT(SMALL), 4
    images, order = torch.randn(1, 3, 16, 16), orders(1, 16, seed)
    patch = int(order[0, visible + rank - 1])
    row, column = divmod(patch, 4)
    changed = images.clone()
    changed[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 5
    with torch.no_grad():
        difference = (model(images, order, visible) - model(changed, order, visible)).abs().amax(-1)[0]
    assert difference[:rank].max() < 1e-6
    assert (difference[rank:] > 1e-6).all()


@given(given_rows=st.integers(1, 9), predicted=st.integers(1, 9))
def test_every_row_sees_each_hidden_position_exactly_once(given_rows: int, predicted: int):
    pattern = attention_pattern(given_rows, predicted)
    auxiliary, patches = pattern[:, given_rows : given_rows + predicted], pattern[:, given_rows + predicted :]
    assert pattern.shape == (2 * predicted, given_rows + 2 * predicted)
    assert pattern[:, :given_rows].all()
    assert (auxiliary ^ patches).all()


def test_encoding_is_the_plain_vit_of_the_published_fine_tuning_model(published):
    weights = torch.load(ORACLE / "finetune.pth.tar", weights_only=False)["state_dict"]
    expected = load_file(ORACLE / "finetune_expected.safetensors")
    published.load_state_dict({name: weights.get(name, tensor) for name, tensor in published.state_dict().items()})
    assert largest_error(published.encode(expected["images"]), expected["features"]) < 1e-5


def test_drop_path_drops_whole_images_and_keeps_the_mean(small):
    images, order = torch.randn(2, 3, 16, 16), orders(2, 16)
    rates = drop_path_rates(3, 0.6)
    keep = drop_path_keep(torch.tensor([[[0.99, 0.99]] * 3, [[0.0, 0.0]] * 3]), 0.6)
    assert rates.tolist() == pytest.approx([0, 0.3, 0.6])
    assert keep[0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert keep[1].flatten().tolist() == pytest.approx([1, 1, 1 / 0.7, 1 / 0.7, 1 / 0.4, 1 / 0.4])
    draws = torch.rand(20_000, 3, 2, generator=torch.Generator().manual_seed(0))
    assert drop_path_keep(draws, 0.6).mean(dim=(0, 2)).tolist() == pytest.approx([1, 1, 1], abs=0.03)
    alone = small(images, order, 4, keep)[0]
    assert torch.allclose(alone, small(images[:1], order[:1], 4, keep[:1])[0], atol=1e-5)
    assert not torch.allclose(alone, small(images, order, 4)[0], atol=1e-3)


def test_images_or_orders_that_do_not_fit_are_refused(small):
    order = orders(2, 16)
    with pytest.raises(UsageError, match="takes"):
        small(torch.randn(2, 3, 20, 20), order, 4)
    with pytest.raises(UsageError, match="order"):
        small(torch.randn(2, 3, 16, 16), order[:, :9], 4)
    with pytest.raises(UsageError, match="visible"):
        small(torch.randn(2, 3, 16, 16), order, 16)
