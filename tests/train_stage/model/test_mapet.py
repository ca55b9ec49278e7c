"""MaPeT equals the published implementation, a naive reference, and its own definition."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import UsageError
from mapet.train_stage.model import attention
from mapet.train_stage.model.mapet import MaPeT, drop_path_rates, drop_path_scales
from mapet.train_stage.model.shape import Shape
from mapet.train_stage.objectives.layouts import CACHE, make_layout
from mapet.train_stage.objectives.token_loss import token_loss
from mapet.train_stage.settings import OBJECTIVES
from mapet.train_stage.weights.published import load_published
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy, gelu, layer_norm

ORACLE = Path(__file__).parents[1] / "oracle"
SMALL = Shape(dim=24, depth=3, heads=2, patch_size=4, image_size=16, k=11)


def largest_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


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


def prepared(model: MaPeT, path: str) -> MaPeT:
    """The model, set up for one way to execute a step."""
    if path == "compiled" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    model.grad_checkpointing = path == "checkpointing"
    if path == "compiled":
        for block in model.blocks:
            block.compile()
    return model


@pytest.fixture
def under_one_mask(monkeypatch):
    """Attention as on devices other than the CPU."""
    monkeypatch.setattr(attention, "_BY_WINDOWS", ())
    CACHE.clear()
    yield
    CACHE.clear()


COMPILED = pytest.param("compiled", marks=pytest.mark.nightly)
PATHS = ["plain", "chunked loss", "one window", "many windows", "checkpointing", COMPILED]


@pytest.mark.parametrize("path", PATHS)
def test_logits_loss_and_every_gradient_equal_the_published_implementation(published, expected, path: str):
    check_against_published(published, expected, path)


@pytest.mark.parametrize("path", ["plain", "checkpointing", COMPILED])
def test_they_are_equal_where_attention_is_computed_under_one_mask(published, expected, under_one_mask, path: str):
    check_against_published(published, expected, path)


def check_against_published(published: MaPeT, expected: dict[str, Tensor], path: str) -> None:
    order, visible = expected["order"], int(expected["least_number"]) - 1
    slices = {"one window": 1, "many windows": 5}.get(path, 2)
    layout = make_layout("mapet", 16, visible, slices=slices)
    rows = prepared(published, path).predict_rows(expected["images"], order, layout)
    predicted = order[:, visible:]
    targets = expected["tokens"].gather(1, predicted)
    loss, _ = token_loss(rows, published.decoder, targets, chunk=7 if path == "chunked loss" else None)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in published.named_parameters()}
    logits = published.decoder(rows)
    raster = predicted.argsort(1)[:, :, None].expand_as(logits)
    assert largest_error(logits.gather(1, raster), expected["logits"]) < 1e-5
    assert abs(loss.item() / expected["loss"].item() - 1) < 1e-5
    assert {f"grad.{name}" for name in gradients} == {name for name in expected if name.startswith("grad.")}
    for name, gradient in gradients.items():
        assert largest_error(gradient, expected[f"grad.{name}"]) < 1e-5, name


def test_the_published_loss_is_pytorchs_cross_entropy_of_all_logits(published, expected):
    order, visible = expected["order"], int(expected["least_number"]) - 1
    logits = published(expected["images"], order, make_layout("mapet", 16, visible))
    targets = expected["tokens"].gather(1, order[:, visible:])
    assert abs(cross_entropy(logits.flatten(0, 1), targets.flatten()).item() / expected["loss"].item() - 1) < 1e-5


@pytest.mark.parametrize("path", ["plain", "checkpointing"])
def test_bfloat16_autocast_stays_near_the_published_values_in_float32(published, expected, path: str):
    order, visible = expected["order"], int(expected["least_number"]) - 1
    layout = make_layout("mapet", 16, visible)
    model = prepared(published, path)
    targets = expected["tokens"].gather(1, order[:, visible:])
    with torch.autocast("cpu", torch.bfloat16):
        rows = model.predict_rows(expected["images"], order, layout)
        loss, _ = token_loss(rows, model.decoder, targets, chunk=5)
    loss.backward()
    assert rows.dtype == loss.dtype == torch.float32  # of the final norm and the loss
    assert abs(loss.item() / expected["loss"].item() - 1) < 2e-2
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert largest_error(parameter.grad, expected[f"grad.{name}"]) < 2e-2, name


def naive_logits(objective: str, model: MaPeT, images: Tensor, order: Tensor, visible: int) -> Tensor:
    """The tables of the objectives read literally: raster order, a dense mask per image, every row in every block."""
    weights, shape = dict(model.named_parameters()), model.shape
    logits = []
    for image, permutation in zip(images, order, strict=True):
        patches, rank = shape.patches, {int(patch): t for t, patch in enumerate(permutation[visible:], start=1)}
        position = weights["pos_embed"][0]
        content = naive_patches(image, weights, shape) + position[1:]
        auxiliary = weights["mask_positional_token"][0] + position[1:]
        masked = [patch for patch in range(patches) if patch in rank]
        inputs = {("class", None): weights["cls_token"][0, 0] + position[0]}
        for patch in range(patches):
            hidden = objective == "mim" and patch in rank
            inputs["patch", patch] = auxiliary[patch] if hidden else content[patch]
        if objective == "mapet":
            inputs |= {("auxiliary", patch): auxiliary[patch] for patch in masked}
        if objective != "mim":
            inputs |= {("query", patch): auxiliary[patch] for patch in masked}
        rows = list(inputs)
        keys = [row for row in rows if row[0] != "query"]
        mask = torch.tensor([[attends(objective, row, key, rank) for key in keys] for row in rows])
        hidden = torch.stack(list(inputs.values()))
        for index in range(shape.depth):
            hidden = naive_block(weights, f"blocks.{index}.", hidden, len(keys), mask, shape.heads)
        hidden = layer_norm(hidden, (shape.dim,), weights["norm.weight"], weights["norm.bias"], 1e-6)
        read = "patch" if objective == "mim" else "query"
        queries = hidden[[rows.index((read, patch)) for patch in sorted(masked, key=rank.__getitem__)]]
        logits.append(queries @ weights["decoder.weight"].T + weights["decoder.bias"])
    return torch.stack(logits)


def naive_patches(image: Tensor, weights: dict[str, Tensor], shape: Shape) -> Tensor:
    kernel, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    return conv2d(image[None], kernel, bias, stride=shape.patch_size)[0].flatten(1).T


def attends(objective: str, row: tuple, key: tuple, rank: dict[int, int]) -> bool:
    if objective == "mim":
        return True
    kind, patch = row
    key_kind, key_patch = key
    is_visible = key_kind == "class" or (key_kind == "patch" and key_patch not in rank)
    if kind == "class" or kind == "auxiliary" or (kind == "patch" and patch not in rank):
        return is_visible or key_kind == "auxiliary"
    t = rank[patch]
    if key_kind == "auxiliary":
        return rank[key_patch] > t if kind == "patch" else rank[key_patch] >= t
    return is_visible or (rank[key_patch] <= t if kind == "patch" else rank[key_patch] < t)


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


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("visible", [0, 1, 4, 15])
def test_logits_equal_a_naive_dense_mask_implementation(small, objective: str, visible: int):
    images, order = torch.randn(2, 3, 16, 16), orders(2, 16)
    logits = small(images, order, make_layout(objective, 16, visible))
    assert largest_error(logits, naive_logits(objective, small, images, order, visible)) < 1e-5


@pytest.mark.parametrize("objective", ["mapet", "pim"])
@pytest.mark.parametrize("ranks", [(11,), (0, 1), (2, 5, 9)])
def test_fewer_query_rows_give_the_same_logits_at_their_ranks(small, objective: str, ranks: tuple[int, ...]):
    images, order = torch.randn(2, 3, 16, 16), orders(2, 16)
    few, every = (small(images, order, make_layout(objective, 16, 4, rank_choice)) for rank_choice in (ranks, None))
    assert largest_error(few, every[:, list(ranks)]) < 1e-5


@settings(max_examples=15, deadline=None)
@given(objective=st.sampled_from(["mapet", "pim"]), rank=st.integers(1, 12), seed=st.integers(0, 1000))
def test_a_prediction_depends_on_earlier_patches_only(objective: str, rank: int, seed: int):
    torch.manual_seed(seed)
    model, visible = MaPeT(SMALL), 4
    layout = make_layout(objective, 16, visible)
    images, order = torch.randn(1, 3, 16, 16), orders(1, 16, seed)
    patch = int(order[0, visible + rank - 1])
    row, column = divmod(patch, 4)
    changed = images.clone()
    changed[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 5
    with torch.no_grad():
        difference = (model(images, order, layout) - model(changed, order, layout)).abs().amax(-1)[0]
    assert difference[:rank].max() < 1e-6
    assert (difference[rank:] > 1e-6).all()


def test_masked_image_modelling_never_sees_what_it_predicts(small):
    images, order = torch.randn(1, 3, 16, 16), orders(1, 16)
    changed = images.clone()
    for patch in order[0, 10:]:
        row, column = divmod(int(patch), 4)
        changed[:, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 5
    layout = make_layout("mim", 16, 10)
    assert torch.equal(small(images, order, layout), small(changed, order, layout))


def test_encoding_is_the_plain_vit_of_the_published_fine_tuning_model(published):
    weights = torch.load(ORACLE / "finetune.pth.tar", weights_only=False)["state_dict"]
    expected = load_file(ORACLE / "finetune_expected.safetensors")
    published.load_state_dict({name: weights.get(name, tensor) for name, tensor in published.state_dict().items()})
    assert largest_error(published.encode(expected["images"]), expected["features"]) < 1e-5


def test_drop_path_drops_whole_images_and_keeps_the_mean(small):
    images, order = torch.randn(2, 3, 16, 16), orders(2, 16)
    rates = drop_path_rates(3, 0.6)
    scale = drop_path_scales(torch.tensor([[[0.99, 0.99]] * 3, [[0.0, 0.0]] * 3]), 0.6)
    assert rates.tolist() == pytest.approx([0, 0.3, 0.6])
    assert scale[0].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert scale[1].flatten().tolist() == pytest.approx([1, 1, 1 / 0.7, 1 / 0.7, 1 / 0.4, 1 / 0.4])
    draws = torch.rand(20_000, 3, 2, generator=torch.Generator().manual_seed(0))
    assert drop_path_scales(draws, 0.6).mean(dim=(0, 2)).tolist() == pytest.approx([1, 1, 1], abs=0.03)
    layout = make_layout("mapet", 16, 4)
    alone = small(images, order, layout, scale)[0]
    assert torch.allclose(alone, small(images[:1], order[:1], layout, scale[:1])[0], atol=1e-5)
    assert not torch.allclose(alone, small(images, order, layout)[0], atol=1e-3)


def test_images_or_orders_that_do_not_fit_are_refused(small):
    order, layout = orders(2, 16), make_layout("mapet", 16, 4)
    with pytest.raises(UsageError, match="takes"):
        small(torch.randn(2, 3, 20, 20), order, layout)
    with pytest.raises(UsageError, match="order"):
        small(torch.randn(2, 3, 16, 16), order[:, :9], layout)
