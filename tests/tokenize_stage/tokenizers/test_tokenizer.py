"""Anything that implements `Tokenizer` encodes images into a store; k-CLIP's encode gives the stored tokens."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.shared.errors import DataError, FingerprintMismatch
from mapet.shared.images.decode import read_image
from mapet.shared.images.views import Preprocess, ViewPolicy, center_view, to_array
from mapet.shared.sources.keys import KeyLedger
from mapet.shared.sources.sources import open_source
from mapet.shared.storage.files import read_sealed_json
from mapet.shared.tokens.codebook import FORMAT, VERSION
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encoding.reencode import encode_again
from mapet.tokenize_stage.encoding.shards import Encoder
from mapet.tokenize_stage.encoding.writing import begin_store, finish_store, write_shards
from mapet.tokenize_stage.inspect import inspect, show
from mapet.tokenize_stage.tokenizers.base import Tokenizer
from mapet.tokenize_stage.tokenizers.opening import open_tokenizer, read_tokenizer
from mapet.tokenize_stage.verify import verify
from numpy.typing import NDArray
from torch import Tensor


class Brightness(Tokenizer):
    """The mean brightness of a patch in 16 steps: a tokenizer without a tower or a codebook."""

    preprocess = Preprocess(32, "squash", 32, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    grid, k, dim, device = (4, 2), 16, 1, torch.device("cpu")
    fingerprint = hashlib.sha256(b"mean brightness in 16 steps").hexdigest()

    @property
    def description(self) -> dict:
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "tower": "brightness",
            "k": self.k,
            "grid": list(self.grid),
            "preprocess": self.preprocess.to_json(),
        }

    def features(self, pixels: Tensor) -> Tensor:
        grey = pixels.float().mean(1).unflatten(1, (4, 8)).unflatten(3, (2, 16)).mean((2, 4))
        return grey.reshape(len(pixels), 8, 1)

    def assign(self, features: NDArray) -> tuple[NDArray, NDArray]:
        tokens = (features[:, 0] / 16).astype(np.uint16)
        return tokens, (features[:, 0] - 16 * tokens - 8) ** 2

    def nearly_equal(self, features: NDArray, tokens: NDArray, nearest: NDArray) -> NDArray:
        return abs(features[:, 0] - 16 * np.maximum(tokens, nearest)) < 1e-3


@pytest.fixture
def brightness(chain, tmp_path: Path) -> Path:
    """A store of the chain's images by that tokenizer, three views each."""
    encoder = Encoder(Brightness(), ViewPolicy("random-resized", 3), False, batch_size=16, workers=0)
    shards, out, ledger = open_source(chain.images), tmp_path / "tokens", KeyLedger()
    begin_store(out, encoder)
    write_shards(out, encoder, shards, ledger, "zarr")
    finish_store(out, shards, ledger, changed=True)
    return out


def test_a_tokenizer_of_thirty_lines_writes_a_store_that_opens_and_verifies(chain, brightness: Path):
    store = TokenStore(brightness)
    assert (len(store), store.k, store.grid, store.views) == (96, 16, (4, 2), 3)
    assert store.fingerprint == Brightness.fingerprint
    assert store.codebook == Brightness().description
    assert verify(brightness, images=str(chain.images)) == 96
    report = inspect(brightness, html=brightness.parent / "page.html", images=str(chain.images))
    assert report["tokens"] == 96 * 3 * 8
    show(report)
    assert "brightness" in (brightness.parent / "page.html").read_text()
    for shard in open_source(chain.images):
        record = shard.index()[5]
        image, _ = read_image(record)
        rows, at = store.find(record.key)
        for view in range(3):
            top, left, height, width = rows.crops[at, view]
            crop = image.resize((32, 32), 2, box=(left, top, left + width, top + height))
            grey = np.asarray(crop, dtype=float)[:, :: -1 if rows.flips[at, view] else 1].mean(2)
            expected = grey.reshape(4, 8, 2, 16).mean((1, 3)) // 16
            assert np.array_equal(rows.tokens[at, view], expected)


def test_any_tokenizer_can_encode_again(chain, brightness: Path, faulty):
    sources = {shard.name: shard for shard in open_source(chain.images)}
    store = TokenStore(brightness)
    same = encode_again(store, Brightness(), sources, 12, 0, batch_size=16, workers=0)
    assert (same.images, same.tokens, same.differ, same.problems) == (12, 12 * 24, 0, [])


def test_tokens_of_kclip_are_those_of_the_store_for_bytes_and_for_floats(chain):
    tokenizer, store = open_tokenizer(chain.codebook, device="cpu"), TokenStore(chain.tokens)
    assert (tokenizer.k, tokenizer.grid, tokenizer.dim) == (16, (8, 8), 32)
    assert tokenizer.fingerprint == store.fingerprint
    assert tokenizer.description == read_sealed_json(chain.codebook / "codebook.json", format=FORMAT, version=VERSION)
    assert tokenizer.description == store.codebook
    records = open_source(chain.images)[0].index()[:16]
    views = (to_array(center_view(read_image(record)[0], tokenizer.preprocess)) for record in records)
    pixels = torch.from_numpy(np.stack(list(views)))
    tokens = tokenizer.encode(pixels)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (16, 8, 8))
    assert np.array_equal(tokens.numpy(), np.stack([store[record.key].tokens[0] for record in records]))
    floats = pixels / 255
    assert torch.equal(tokenizer.encode(floats), tokens)
    assert torch.equal(floats, pixels / 255)


def test_cosine_features_have_length_one_before_they_are_assigned(chain, tower: str, tmp_path: Path):
    build_codebook(chain.tars[0], tmp_path / "book", tower=tower, k=8, metric="cosine", iterations=3, restarts=1)
    tokenizer = open_tokenizer(tmp_path / "book", device="cpu")
    assert tokenizer.unit_length
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = torch.nn.functional.normalize(tokenizer.features(pixels), dim=-1)
    cosine = features @ torch.from_numpy(read_tokenizer(tmp_path / "book").codebook.centroids).T
    assert torch.equal(tokenizer.encode(pixels).flatten(1), cosine.argmax(-1))


def test_rounding_is_told_from_a_wrong_token(chain):
    tokenizer = open_tokenizer(chain.codebook, device="cpu")
    centroids = read_tokenizer(chain.codebook).codebook.centroids
    middle = (centroids[:1] + centroids[1:2]) / 2
    both = np.array([0, 1], dtype=np.uint16)
    assert tokenizer.nearly_equal(np.repeat(middle, 2, axis=0), both, both[::-1]).all()
    assert not tokenizer.nearly_equal(centroids[:1], both[1:], both[:1]).any()


def test_what_cannot_be_opened_is_refused(chain, resnet_tower: str, tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        read_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FingerprintMismatch, match="is not the tower of the codebook"):
        open_tokenizer(chain.codebook, tower=resnet_tower)
