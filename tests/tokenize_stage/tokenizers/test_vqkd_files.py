"""Checkpoints of VQ-KD under all published names: decoders of depth 1 and 3, CLIP or DINO as the teacher."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mapet import load_tokenizer
from mapet.tokenize_stage.import_tokens import import_tokenizer

WIDTH, LENGTH, CODES = 64, 8, 24
NAMES = [f"vqkd_encoder_base_decoder_{depth}x768x12_{teacher}" for depth in (1, 3) for teacher in ("clip", "dino")]


def shapes_of_vit(prefix: str, depth: int, inputs: int, patch: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of BEiT's ViT with average pooling, of which encoder and decoder are made."""
    yield f"{prefix}.cls_token", (1, 1, WIDTH)
    yield f"{prefix}.pos_embed", (1, 17, WIDTH)
    yield f"{prefix}.patch_embed.proj.weight", (WIDTH, inputs, patch, patch)
    yield f"{prefix}.patch_embed.proj.bias", (WIDTH,)
    for name in ("weight", "bias"):
        yield f"{prefix}.fc_norm.{name}", (WIDTH,)
    for number in range(depth):
        block = f"{prefix}.blocks.{number}"
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias"):
            yield f"{block}.{name}", (WIDTH,)
        yield f"{block}.attn.qkv.weight", (3 * WIDTH, WIDTH)
        for name, outputs, taken in (("attn.proj", WIDTH, WIDTH), ("mlp.fc1", 128, WIDTH), ("mlp.fc2", WIDTH, 128)):
            yield f"{block}.{name}.weight", (outputs, taken)
            yield f"{block}.{name}.bias", (outputs,)


def task_layer(prefix: str, outputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number, size in ((0, WIDTH), (2, outputs)):
        yield f"{prefix}.{number}.weight", (size, WIDTH)
        yield f"{prefix}.{number}.bias", (size,)


def encoder_shapes() -> dict[str, tuple[int, ...]]:
    return dict([*shapes_of_vit("encoder", 2, 3, 16), *task_layer("encode_task_layer", LENGTH)])


def shapes_beside_encoder(decoder_depth: int, teacher: str) -> dict[str, tuple[int, ...]]:
    shapes = dict([*shapes_of_vit("decoder", decoder_depth, LENGTH, 1)])
    shapes |= dict(task_layer("decode_task_layer", 512 if teacher == "clip" else 768))
    shapes |= {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}
    shapes |= {
        "quantize.cluster_size": (CODES,),
        "quantize.embedding.cluster_size": (CODES,),
        "quantize.embedding.embed_avg": (CODES, LENGTH),
        "quantize.embedding.initted": (1,),
    }
    towers = {
        "clip": {"visual.proj": (64, 32), "visual.transformer.resblocks.0.ln_1.weight": (64,), "logit_scale": ()},
        "dino": {"cls_token": (1, 1, 64), "blocks.0.attn.qkv.weight": (192, 64), "norm.weight": (64,)},
    }
    return shapes | {f"teacher_model.{name}": shape for name, shape in towers[teacher].items()}


def written(name: str, path: Path) -> Path:
    """A checkpoint of that name; encoder and codes are the same under all names."""
    depth, teacher = int(name.split("decoder_")[1][0]), name.rpartition("_")[2]
    same, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(NAMES.index(name) + 1)
    tensors = {key: 0.3 * torch.randn(shape, generator=same) for key, shape in encoder_shapes().items()}
    codes = torch.randn(CODES, LENGTH, generator=same)
    tensors["quantize.embedding.weight"] = torch.nn.functional.normalize(codes, dim=1)
    for key, shape in shapes_beside_encoder(depth, teacher).items():
        tensors[key] = torch.randn(shape, generator=other)
    torch.save({"model": tensors, "epoch": 99, "args": argparse.Namespace(model=name)}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vqkd")
    return {name: written(name, folder / f"{name}-abcdef01.pth") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_every_name_opens_and_holds_the_encoder_alone(files, tmp_path: Path, name: str):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    tokenizer = load_tokenizer(files[name], device="cpu")
    assert (tokenizer.grid, tokenizer.k, tokenizer.dim, tokenizer.unit_length) == ((4, 4), CODES, LENGTH, True)
    import_tokenizer(tmp_path / "book", vqkd=files[name], device="cpu")
    imported = load_tokenizer(tmp_path / "book", device="cpu")
    tokens = imported.encode(pixels)
    assert torch.equal(tokens, tokenizer.encode(pixels))
    assert len(tokens.unique()) > 2
    assert imported.description["imported"]["model"] == name
    weights = {key for key, _ in imported.tower._module.named_parameters()}
    assert all(key.startswith(("vit.", "head.")) for key in weights)
    assert {key.split(".")[2] for key in weights if key.startswith("vit.blocks.")} == {"0", "1"}


def test_decoder_and_teacher_do_not_change_tokens(files):
    opened = [load_tokenizer(file, device="cpu") for file in files.values()]
    assert len({tokenizer.fingerprint for tokenizer in opened}) == 1
