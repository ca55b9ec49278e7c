"""VQ-KD and DALL-E's dVAE compute what their published code computed; a file that runs something is refused."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet import load_tokenizer
from mapet.shared.errors import DataError, UsageError
from mapet.tokenize_stage.import_tokens import import_tokenizer
from safetensors.torch import load_file, save_file

ORACLE = Path(__file__).parents[4] / "shared" / "oracle" / "tokenizers"
needs_oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason="no oracle of the published tokenizers")


def pixels(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@needs_oracle
def test_vqkd_equals_its_oracle():
    expected, tokenizer = load_file(ORACLE / "vqkd_expected.safetensors"), load_tokenizer(ORACLE / "vqkd.pth")
    assert torch.equal(tokenizer.encode(expected["images"]).cpu().flatten(1), expected["tokens"])
    difference = tokenizer.features(expected["images"]).cpu() - expected["features"]
    assert difference.abs().max() <= 1e-5 * expected["features"].abs().max()


@needs_oracle
def test_dvae_equals_its_oracle():
    expected, tokenizer = load_file(ORACLE / "dvae_expected.safetensors"), load_tokenizer(ORACLE / "dvae.pkl")
    assert torch.equal(tokenizer.encode(expected["images"]).cpu().flatten(1), expected["tokens"])
    codes, bias = tokenizer.codebook.centroids, tokenizer.codebook.bias
    logits = tokenizer.features(expected["images"]).cpu().numpy() @ codes.T + bias
    assert abs(logits - expected["logits"].numpy()).max() <= 1e-5 * expected["logits"].abs().max()


def test_the_dvae_is_the_same_from_all_its_files(dvae_files):
    opened = {name: load_tokenizer(path, device="cpu") for name, path in dvae_files.items()}
    tokens = {name: tokenizer.encode(pixels()) for name, tokenizer in opened.items()}
    assert tokens["zip"].shape == (2, 32, 32)
    assert len(tokens["zip"].unique()) > 3
    assert len({tokenizer.fingerprint for tokenizer in opened.values()}) == 1
    assert all(torch.equal(tokens["zip"], other) for other in tokens.values())


def test_an_imported_folder_gives_the_tokens_of_the_file(vqkd_file, dvae_files, tmp_path: Path):
    for kind, file in (("vqkd", vqkd_file), ("dvae", dvae_files["zip"])):
        import_tokenizer(tmp_path / kind, **{kind: file}, image_size=64 if kind == "dvae" else None, device="cpu")
        folder, direct = load_tokenizer(tmp_path / kind, device="cpu"), load_tokenizer(file, device="cpu")
        assert torch.equal(folder.encode(pixels()), direct.encode(pixels()))
        features = folder.features(pixels())
        assert folder.description["grid"] == list(folder.grid)
        flat = features.flatten(0, 1).numpy()
        if folder.unit_length:
            flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        tokens, _ = folder.assign(flat)
        assert folder.nearly_equal(flat, tokens, tokens).all()
        assert not folder.nearly_equal(flat, (tokens + 1) % folder.k, tokens).all()


def test_the_keys_of_vqkd_have_no_bias(vqkd_file):
    vit = load_tokenizer(vqkd_file, device="cpu").tower._module.vit
    bias = vit.blocks[0].attn.qkv.bias.view(3, -1)
    assert not bias[1].any()
    assert bias[0].any()
    assert bias[2].any()


class Malicious:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def write_malicious(container: str, path: Path, witness: Path) -> None:
    content = {"model": {"blocks.group_1.w": torch.zeros(1), "quantize.embedding.weight": Malicious(witness)}}
    if container == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif container == "args":
        torch.save({"model": {"a": torch.zeros(1)}, "args": Malicious(witness)}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=container == "zip")


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle", "args"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_malicious_file_is_refused_and_runs_nothing(tmp_path: Path, container: str, suffix: str):
    bad, witness = tmp_path / f"bad{suffix}", tmp_path / "witness"
    write_malicious(container, bad, witness)
    for kind in ("vqkd", "dvae"):
        with pytest.raises(DataError, match=r"was not loaded, and nothing in it was run|not a published file"):
            import_tokenizer(tmp_path / "out", **{kind: bad})
    with pytest.raises(DataError):
        load_tokenizer(bad)
    assert not witness.exists()
    assert not (tmp_path / "out").exists()
    if container in ("zip", "legacy"):
        torch.load(bad, weights_only=False)
        assert witness.exists()  # it does run where pickles are executed


def test_a_torchscript_archive_is_refused(tmp_path: Path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pth")
    with pytest.raises(DataError, match=r"not a published file|was not loaded"):
        load_tokenizer(tmp_path / "script.pth")


@pytest.mark.parametrize("cut", [0, 10, 1000, -100])
def test_a_truncated_file_is_refused(vqkd_file, tmp_path: Path, cut: int):
    (tmp_path / "cut.pth").write_bytes(vqkd_file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"cut\.pth"):
        load_tokenizer(tmp_path / "cut.pth")


def test_weights_of_something_else_are_refused(vqkd_file, tmp_path: Path):
    save_file({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="neither VQ-KD nor DALL-E's dVAE"):
        load_tokenizer(tmp_path / "other.safetensors")
    tensors = torch.load(vqkd_file, weights_only=False)["model"]
    save_file({name: tensor for name, tensor in tensors.items() if "norm1" not in name}, tmp_path / "less.safetensors")
    with pytest.raises(DataError, match="does not hold the weights of a vqkd tokenizer"):
        load_tokenizer(tmp_path / "less.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pixels: pixels * 255, "in \\[0, 1\\]"),
        (lambda pixels: pixels * 4 - 2, "before any normalisation"),
        (lambda pixels: pixels[:, :1], "not \\(2, 1, 64, 64\\)"),
        (lambda pixels: pixels[..., :32], "takes pixels"),
        (lambda pixels: pixels.long(), "int64"),
        (lambda pixels: pixels[0], "takes pixels"),
    ],
    ids=["0-255", "normalised", "grey", "not square", "int64", "no batch"],
)
def test_pixels_that_are_not_pixels_are_refused(vqkd_file, change, message):
    with pytest.raises(UsageError, match=message):
        load_tokenizer(vqkd_file, device="cpu").encode(change(pixels()))
