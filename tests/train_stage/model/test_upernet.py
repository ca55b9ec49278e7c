"""UPerNet's shapes, its number of parameters by hand, and its logits against a naive implementation."""

from pathlib import Path

import pytest
import torch
from mapet.train_stage.model.shape import Shape
from mapet.train_stage.model.upernet import UPerNet, tapped_blocks
from mapet.train_stage.weights.weights import Weights
from torch.nn import functional as F

SHAPE = Shape(dim=24, depth=3, heads=2, patch_size=8, image_size=40, k=0)


def small_model() -> UPerNet:
    """With random values everywhere, so that no bias or scale is its neutral one."""
    model, draw = UPerNet(SHAPE, classes=5, channels=32), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return model.double()


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (4, (0, 1, 2, 3)), (1, (0, 0, 0, 0))]
)
def test_the_blocks_that_are_read_are_those_of_beit(depth: int, blocks: tuple[int, ...]):
    assert tapped_blocks(depth) == blocks


def test_the_published_model_has_the_parameters_that_its_layers_have():
    """ViT-B/16 at 512 pixels with 150 classes: 163 million, as UPerNet on ViT-B is said to have."""
    with torch.device("meta"):
        model = UPerNet(Shape(768, 12, 12, patch_size=16, image_size=512, k=0), classes=150, channels=768)
    dim, channels, classes = 768, 768, 150

    def layer(inputs: int, outputs: int, side: int) -> int:
        return inputs * outputs * side * side + 2 * outputs

    neck = 3 * (4 * dim * dim + dim) + 2 * dim
    pyramid = 4 * layer(dim, channels, 1) + layer(dim + 4 * channels, channels, 3)
    levels = 3 * layer(dim, channels, 1) + 3 * layer(channels, channels, 3) + layer(4 * channels, channels, 3)
    auxiliary = layer(dim, 256, 3) + 256 * classes + classes
    block = 12 * dim * dim + 13 * dim + 2 * dim  # with LayerScale
    embedding = 3 * 16 * 16 * dim + dim + dim + (1 + 32 * 32) * dim
    expected = neck + pyramid + levels + channels * classes + classes + auxiliary + 12 * block + embedding
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 163_305_260
    assert not list(model.buffers())


def normed(maps: torch.Tensor, norm: torch.nn.GroupNorm) -> torch.Tensor:
    """GroupNorm from its definition."""
    groups = maps.view(len(maps), norm.num_groups, -1)
    groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + norm.eps).sqrt()
    return groups.view(maps.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]


def naive(model: UPerNet, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Head and auxiliary head, from timm's rows and functions of PyTorch."""
    encoder = ("patch_embed.", "cls_token", "pos_embed", "blocks.")
    tensors = {name: value for name, value in model.state_dict().items() if name.startswith(encoder)}
    norm = {"norm.weight": torch.ones(24).double(), "norm.bias": torch.zeros(24).double()}
    vit = Weights(Path("x"), SHAPE, tensors | norm).vit()
    rows = vit.forward_intermediates(images, indices=3, norm=False, output_fmt="NCHW", intermediates_only=True)
    one, two, three, four = (rows[block] for block in tapped_blocks(3))

    def layer(maps: torch.Tensor, of: torch.nn.Sequential) -> torch.Tensor:
        side = of[0].kernel_size[0]
        return F.relu(normed(F.conv2d(maps, of[0].weight, padding=side // 2), of[1]))

    def up(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(maps, size, mode="bilinear")

    def twice(maps: torch.Tensor, of: torch.nn.ConvTranspose2d) -> torch.Tensor:
        """Each pixel becomes 2x2 pixels: a product with the kernel."""
        height, width = maps.shape[2:]
        spread = torch.einsum("bchw,cdyx->bdhywx", maps, of.weight).reshape(len(maps), -1, 2 * height, 2 * width)
        return spread + of.bias[:, None, None]

    neck, head = model.neck, model.decode_head
    one = F.gelu(normed(twice(one, neck.up4[0]), neck.up4[1]))
    one = twice(one, neck.up4[3])
    two = twice(two, neck.up2)
    four = torch.stack([four[:, :, y : y + 2, x : x + 2].amax((2, 3)) for y in (0, 2) for x in (0, 2)], 2)
    four = four.view(len(images), 24, 2, 2)
    pooled = []
    for side, of in zip((1, 2, 3, 6), head.pooled, strict=True):
        edges = [(k * 2 // side, -(-(k + 1) * 2 // side)) for k in range(side)]
        cells = [four[:, :, a:b, c:d].mean((2, 3)) for a, b in edges for c, d in edges]
        pooled.append(up(layer(torch.stack(cells, 2).view(len(images), 24, side, side), of), (2, 2)))
    level4 = layer(torch.cat([four, *pooled], 1), head.bottleneck)
    level3 = layer(three, head.laterals[2]) + up(level4, (5, 5))
    level2 = layer(two, head.laterals[1]) + up(level3, (10, 10))
    level1 = layer(one, head.laterals[0]) + up(level2, (20, 20))
    outputs = [layer(level, of) for level, of in zip((level1, level2, level3), head.smooth, strict=True)] + [level4]
    fused = layer(torch.cat([up(level, (20, 20)) for level in outputs], 1), head.fusion)
    logits = F.conv2d(fused, head.classifier.weight, head.classifier.bias)
    auxiliary = model.auxiliary_head
    return logits, F.conv2d(layer(three, auxiliary.layer), auxiliary.classifier.weight, auxiliary.classifier.bias)


def test_the_logits_are_those_of_a_naive_implementation():
    model = small_model()
    images = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = model(images), naive(model, images)
        whole = model.segment(images)
    assert [tuple(logits.shape) for logits in ours] == [(2, 5, 20, 20), (2, 5, 5, 5)]
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < 1e-8 * other.abs().max()
    assert torch.equal(whole, F.interpolate(ours[0], (40, 40), mode="bilinear"))


def test_an_images_logits_do_not_depend_on_the_others():
    model, images = small_model(), torch.randn(3, 3, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        together, alone = model(images)[0], torch.cat([model(image[None])[0] for image in images])
    assert (together - alone).abs().max() < 1e-9 * alone.abs().max()


def test_dropped_channels_do_not_count():
    model, images = small_model(), torch.randn(1, 3, 40, 40, dtype=torch.float64)
    scale = torch.ones(1, 64, dtype=torch.float64)
    scale[:, 3], scale[:, 32 + 7] = 0, 0
    with torch.no_grad():
        ours = model(images, dropout_scale=scale)
        model.decode_head.classifier.weight[:, 3] = 0
        model.auxiliary_head.classifier.weight[:, 7] = 0
        theirs = model(images)
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(ours, theirs, strict=True))
