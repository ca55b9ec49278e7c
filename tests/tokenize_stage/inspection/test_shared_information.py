"""What two tokenizations of the same images say about each other, whatever their K and grids are."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.tokens.rows import ShardRows
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.counting.sample import SampledImages
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.inspect import inspect, show
from mapet.tokenize_stage.inspection.shared_information import shared_information


def images(tokens: np.ndarray, hashes=None, crops=None, flips=None) -> SampledImages:
    """tokens (n, V, H, W)."""
    n, views = tokens.shape[:2]
    whole = np.tile([0.0, 0.0, 64.0, 64.0], (n, views, 1))
    hashes = np.arange(n, dtype=np.uint64) if hashes is None else hashes
    unflipped = np.zeros((n, views), bool)
    labels = np.full(n, -1)
    return SampledImages(
        hashes, tokens, whole if crops is None else crops, unflipped if flips is None else flips, labels
    )


def mutual(pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """Mutual information in bits and normalised, by its definition."""
    joint, n = Counter(pairs), len(pairs)
    first, second = (Counter(pair[side] for pair in pairs) for side in (0, 1))
    bits = sum(count / n * math.log2(count * n / (first[a] * second[b])) for (a, b), count in joint.items())
    of_first, of_second = (-sum(c / n * math.log2(c / n) for c in part.values()) for part in (first, second))
    return bits, bits / ((of_first + of_second) / 2)


def test_renamed_codes_say_everything():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, (40, 2, 6, 6))
    names = random.choice(2**31 - 1, 50, replace=False).astype(np.uint32)
    found = shared_information(images(tokens), images(names[tokens]))
    assert (found["images"], found["patches"]) == (40, 40 * 72)
    assert found["information"]["nmi"]["value"] == pytest.approx(1)
    assert found["information"]["nmi"]["adjusted"] == pytest.approx(1)


def test_unrelated_codes_say_nothing_beyond_chance():
    random = np.random.default_rng(0)
    here, there = random.integers(0, 40, (60, 1, 8, 8)), random.integers(0, 200, (60, 1, 8, 8))
    nmi = shared_information(images(here), images(there))["information"]["nmi"]
    assert nmi["value"] > 0.1  # what many codes of few tokens give by chance
    assert nmi["adjusted"] == pytest.approx(0, abs=0.01)


def test_grids_crops_and_flips_may_differ():
    """The other grid is half as fine, mirrored, and shows the right half of the picture."""
    random = np.random.default_rng(0)
    here, there = random.integers(0, 9, (30, 1, 4, 4)), random.integers(0, 5, (30, 1, 2, 2))
    crops = np.tile([0.0, 32.0, 64.0, 32.0], (30, 1, 1))
    found = shared_information(images(here), images(there, crops=crops, flips=np.ones((30, 1), bool)))
    pairs = [[], []]
    for by in (0, 1):
        for image in range(30):
            other = there[image - by, 0]
            pairs[by] += [(here[image, 0, row, column], other[row // 2, 3 - column])
                          for row in range(4) for column in (2, 3)]  # fmt: skip
    bits, nmi = mutual(pairs[0])
    assert (found["images"], found["patches"]) == (30, 30 * 8)
    assert found["information"]["bits"] == pytest.approx(bits)
    assert found["information"]["nmi"]["value"] == pytest.approx(nmi)


def test_images_are_joined_by_key_and_views_by_number():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 20, (30, 3, 4, 4))
    hashes = np.arange(30, dtype=np.uint64)
    found = shared_information(images(tokens), images(tokens[10:, :2], hashes=hashes[10:]))
    assert (found["images"], found["patches"]) == (20, 20 * 32)
    assert found["information"]["nmi"]["value"] == pytest.approx(1)
    assert shared_information(images(tokens), images(tokens, hashes=hashes + np.uint64(30))) is None
    elsewhere = np.tile([500.0, 0.0, 64.0, 64.0], (30, 3, 1))
    assert shared_information(images(tokens), images(tokens, crops=elsewhere)) is None
    constant = np.zeros((30, 1, 4, 4), int)
    assert shared_information(images(constant), images(constant))["information"] is None


@pytest.fixture(scope="module")
def other_store(chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Codebook and store of another tokenizer, with another grid and K, of the same images."""
    root = tmp_path_factory.mktemp("other")
    build_codebook(chain.images, root / "book", tower="pixels:16", image_size=64, k=9, restarts=1, iterations=2)
    encode_shards(chain.images, root / "book", root / "tokens")
    return root / "book", root / "tokens"


def test_two_tokenizers_are_compared_side_by_side(chain, other_store, capsys):
    book, tokens = other_store
    options = {"images": chain.images, "codebook": chain.codebook, "quality_images": 8}
    about = inspect(chain.tokens, against=tokens, against_codebook=book, **options)
    against = about["against"]
    assert against["quality"]["here"] == about["quality"]
    alone = inspect(tokens, images=chain.images, codebook=book, quality_images=8)["quality"]
    assert against["quality"]["there"] == alone
    assert alone["pictures"]["reconstruction"]["error"] > 0
    pairs = []
    here, there = TokenStore(chain.tokens), TokenStore(tokens)
    for key in here:
        fine, coarse = (next(store.tokens([key])).tokens[0] for store in (here, there))
        pairs += [
            (int(fine[row, column]), int(coarse[row // 2, column // 2])) for row in range(8) for column in range(8)
        ]
    bits, nmi = mutual(pairs)
    shared = against["shared_information"]
    assert (shared["images"], shared["patches"]) == (96, 96 * 64)
    assert shared["information"]["bits"] == pytest.approx(bits)
    assert shared["information"]["nmi"]["value"] == pytest.approx(nmi)
    show(about)
    said = capsys.readouterr().out
    for share in (about["quality"]["labels"]["purity"]["value"], alone["labels"]["purity"]["value"]):
        assert f"{share:.2%} (chance" in said
    assert "9 of 9 used" in said
    assert f"{bits:.3f} bits (chance" in said


def test_stores_of_other_images_have_nothing_in_common(chain, faulty):
    def rename(rows: ShardRows) -> ShardRows:
        return replace(rows, keys=np.array([f"other {key}" for key in rows.keys], object))

    found = inspect(chain.tokens, against=faulty(chain.tokens, rename))["against"]
    assert found["shared_information"] is None
    assert "no sampled view" in found["not_compared"][0]
