"""Visual tokenizers with random weights in their published layouts, for benchmarks of the machinery around them."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.import_tokens import import_tokenizer
from torch import Tensor


class Size(NamedTuple):
    """The sizes of all tokenizers; `PUBLISHED` are those of the papers."""

    vit: tuple[int, int, int]
    """VQ-KD: width, blocks, pixels of an image."""
    widths: tuple[int, int, int, int]
    """dVAE: of its four groups."""
    blocks: int
    """dVAE: in a group."""
    k: int
    image_size: int
    """Pixels for the dVAE and of the tower of pixels."""


PUBLISHED = Size((768, 12, 224), (256, 512, 1024, 2048), 2, 8192, 112)
SMALL = Size((64, 1, 64), (8, 16, 32, 32), 1, 64, 64)


def write_vqkd(path: Path, size: Size) -> None:
    """A checkpoint of VQ-KD with random weights."""
    dim, depth, pixels = size.vit
    shapes = {
        "encoder.cls_token": (1, 1, dim),
        "encoder.pos_embed": (1, 1 + (pixels // 16) ** 2, dim),
        "encoder.patch_embed.proj.weight": (dim, 3, 16, 16),
        "encoder.patch_embed.proj.bias": (dim,),
        "encoder.fc_norm.weight": (dim,),
        "encoder.fc_norm.bias": (dim,),
        "encode_task_layer.0.weight": (dim, dim),
        "encode_task_layer.0.bias": (dim,),
        "encode_task_layer.2.weight": (32, dim),
        "encode_task_layer.2.bias": (32,),
        "quantize.embedding.weight": (size.k, 32),
    }
    for number in range(depth):
        block = f"encoder.blocks.{number}."
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc2.bias", "attn.proj.bias"):
            shapes[block + name] = (dim,)
        for name in ("attn.q_bias", "attn.v_bias"):
            shapes[block + name] = (dim,)
        shapes |= {block + "attn.qkv.weight": (3 * dim, dim), block + "attn.proj.weight": (dim, dim)}
        shapes |= {block + "mlp.fc1.weight": (4 * dim, dim), block + "mlp.fc1.bias": (4 * dim,)}
        shapes |= {block + "mlp.fc2.weight": (dim, 4 * dim)}
    torch.save({"model": _random(shapes)}, path)


def write_dvae(path: Path, size: Size) -> None:
    """The state dict of the encoder of DALL-E's dVAE with random weights, as FLAVA names it."""
    shapes = {"input": (size.widths[0], 3, 7)}
    width = size.widths[0]
    for group, out in enumerate(size.widths, 1):
        for block in range(1, size.blocks + 1):
            name, hidden = f"group_{group}.group.block_{block}", out // 4
            if width != out:
                shapes[f"{name}.id_path"] = (out, width, 1)
            for number, shape in enumerate([(hidden, width, 3), (hidden, hidden, 3), (hidden, hidden, 3)], 1):
                shapes[f"{name}.res_path.path.conv_{number}"] = shape
            shapes[f"{name}.res_path.path.conv_4"] = (out, hidden, 1)
            width = out
    shapes["output.conv"] = (size.k, width, 1)
    tensors = {f"blocks.{name}.weight": (out, into, side, side) for name, (out, into, side) in shapes.items()}
    torch.save(_random(tensors | {f"blocks.{name}.bias": (out,) for name, (out, _, _) in shapes.items()}), path)


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) / _fan_in(shape) ** 0.5 for name, shape in shapes.items()}


def _fan_in(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])  # 1 for biases


def make_tokenizer(kind: str, images: Path, out: Path, size: Size = SMALL, tower: str = "") -> None:
    """Writes the folder `out` of a tokenizer of a kind: "k-clip" (of `tower`), "pixels", "vqkd" or "dvae"."""
    if kind in ("vqkd", "dvae"):
        file = out.with_suffix(".pth")
        (write_vqkd if kind == "vqkd" else write_dvae)(file, size)
        import_tokenizer(out, **{kind: file}, image_size=size.image_size if kind == "dvae" else None, device="cpu")
    else:
        patches = "pixels:8" if kind == "pixels" else tower
        image_size = size.image_size if kind == "pixels" else None
        options = {"k": size.k, "restarts": 2, "iterations": 10, "device": "cpu"}
        build_codebook(images, out, tower=patches, image_size=image_size, **options)
