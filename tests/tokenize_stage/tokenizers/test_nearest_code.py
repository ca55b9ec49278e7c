"""Tokens by matrix products, as a GPU computes them, are those of an exact search."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mapet.shared.tokens.codebook import INNER_PRODUCT, Codebook
from mapet.tokenize_stage.tokenizers import nearest_code
from mapet.tokenize_stage.tokenizers.nearest_code import NearestCode, codes_for_products, tokens_by_products
from mapet.tokenize_stage.tokenizers.opening import load_tokenizer

SMALL = st.integers(-8, 8).map(np.float32)


def by_products(features: np.ndarray, book: Codebook) -> np.ndarray:
    return tokens_by_products(torch.from_numpy(features), *codes_for_products(book)).numpy()


@given(
    arrays(np.float32, st.tuples(st.integers(1, 12), st.just(3)), elements=SMALL),
    arrays(np.float32, st.tuples(st.integers(1, 20), st.just(3)), elements=SMALL),
)
def test_the_nearest_centroid_by_distance_and_the_lowest_of_equal_ones(features: np.ndarray, centroids: np.ndarray):
    """Small integers: float32 is exact, so that ties are ties."""
    book = Codebook(centroids, np.zeros(len(centroids), np.int64), {"metric": "l2"})
    squared = ((features[:, None] - centroids) ** 2).sum(-1)
    assert by_products(features, book).tolist() == squared.argmin(1).tolist()


@given(
    arrays(np.float32, st.tuples(st.integers(1, 12), st.just(3)), elements=SMALL),
    arrays(np.float32, st.tuples(st.integers(1, 20), st.just(4)), elements=SMALL),
)
def test_the_largest_inner_product_plus_bias(features: np.ndarray, codes: np.ndarray):
    centroids, bias = np.ascontiguousarray(codes[:, :3]), np.ascontiguousarray(codes[:, 3])
    book = Codebook(centroids, np.zeros(len(centroids), np.int64), {"metric": INNER_PRODUCT}, bias)
    assert by_products(features, book).tolist() == (features @ centroids.T + bias).argmax(1).tolist()


@pytest.mark.parametrize("metric", ["l2", "cosine", INNER_PRODUCT])
@pytest.mark.parametrize("scores", [1, 40, 1 << 27])
def test_they_are_those_of_faiss_whatever_is_computed_at_once(monkeypatch, metric: str, scores: int):
    monkeypatch.setattr(nearest_code, "_MOST_SCORES", scores)
    random = np.random.default_rng(0)
    features, centroids = (random.normal(size=(n, 16)).astype(np.float32) for n in (300, 33))
    if metric == "cosine":
        features, centroids = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, centroids))
    book = Codebook(centroids, np.zeros(33, np.int64), {"metric": metric})
    assert by_products(features, book).tolist() == book.assign(features)[0].tolist()


def test_features_on_the_cpu_get_the_tokens_of_assign(chain):
    tokenizer = load_tokenizer(chain.codebook, device="cpu")
    assert isinstance(tokenizer, NearestCode)
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = tokenizer.features(pixels).flatten(0, 1)
    found = tokenizer.tokens(features)
    assert (
        found.tolist()
        == tokenizer.assign(features.numpy())[0].tolist()
        == by_products(features.numpy(), tokenizer.codebook).tolist()
    )
    assert torch.equal(tokenizer.encode(pixels).flatten(), found)
