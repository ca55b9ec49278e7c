"""Stage one holds for every kind of tokenizer: interrupted work resumes to the same bytes, a flipped byte is found, and
hostile images are named or listed."""

import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from mapet.shared.tokens.codebook import Codebook
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.import_tokens import import_tokenizer
from mapet.tokenize_stage.verify import verify

from ..warm import warm_command
from .encoding.test_hostile import IMAGES, SOUND, UNSOUND, expect_listed, expect_stop, pack, stem
from .test_encode_shards import files_of, wait_for
from .test_inspect_verify import flips

KINDS = ("pixels", "vqkd", "dvae")
"""Everything but k-CLIP, with which all other tests are made."""


@pytest.fixture(scope="module", params=KINDS)
def other_chain(request, chain, vqkd_file, dvae_files, tmp_path_factory: pytest.TempPathFactory):
    """The chain with another tokenizer: pixel clusters, or a published one with random weights."""
    root = tmp_path_factory.mktemp(request.param)
    codebook = root / "codebook"
    if request.param == "pixels":
        options = {"k": 16, "restarts": 1, "iterations": 3, "device": "cpu"}
        build_codebook(chain.images, codebook, tower="pixels:8", image_size=64, **options)
    elif request.param == "vqkd":
        import_tokenizer(codebook, vqkd=vqkd_file, device="cpu")
    else:
        import_tokenizer(codebook, dvae=dvae_files["zip"], image_size=64, device="cpu")
    encode_shards(chain.images, codebook, root / "tokens", device="cpu")
    return replace(chain, codebook=codebook, tokens=root / "tokens")


def test_every_flipped_byte_is_found(other_chain, tmp_path: Path):
    assert flips(other_chain, tmp_path, 44, seed=5, k=Codebook.load(other_chain.codebook).k) == []


def test_a_killed_run_given_again_ends_byte_identical(other_chain, tmp_path: Path):
    out, views = tmp_path / "killed", {"crop": "random-resized", "views": 2}
    encode_shards(other_chain.images, other_chain.codebook, tmp_path / "whole", batch_size=1, device="cpu", **views)
    words = ["--codebook", other_chain.codebook, "--out", out, "--crop", "random-resized", "--views", 2]
    start = [*warm_command(), "tokenize", "encode-shards"]
    command = list(map(str, [*start, other_chain.images, *words, "--batch-size", 1, "--device", "cpu"]))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out / "shards" / f"{other_chain.tars[0].stem}.json", process, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists(), "it had ended before it was killed"
    encode_shards(other_chain.images, other_chain.codebook, out, batch_size=1, device="cpu", **views)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_hostile_images_stop_the_command_or_are_skipped_and_listed(other_chain, tmp_path: Path):
    tar = pack(tmp_path / "x.tar", *((name, data) for name, data, _ in IMAGES.values()))
    expect_stop(tar, other_chain.codebook, tmp_path / "stopped", str(tar))
    found = ["a", *(stem(name) for name, _ in SOUND.values()), "z"]
    listed = [stem(name) for name, _, _ in UNSOUND.values()]
    listed.sort(key=lambda key: key != "named")  # what headers say comes first
    expect_listed(tar, other_chain.codebook, tmp_path / "out", found, listed)


def test_views_that_were_stored_are_encoded_again_to_the_same_tokens(other_chain, tmp_path: Path):
    out = tmp_path / "views"
    encode_shards(other_chain.images, other_chain.codebook, out, crop="random-resized", views=2, device="cpu")
    assert verify(out, codebook=other_chain.codebook, images=str(other_chain.images), reencode=96, device="cpu") == 96
