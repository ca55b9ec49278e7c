"""Stability under flips, shifts and enlargement, and reconstruction, of every kind of tokenizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.shared.errors import FingerprintMismatch
from mapet.shared.images.decode import read_image
from mapet.shared.images.views import CropBox, Preprocess, ViewPolicy, center_view, replay, to_array
from mapet.shared.tokens.store import TokenStore
from mapet.shared.tokens.stored_views import StoredViews, by_shard, choose_images
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.import_tokens import import_tokenizer
from mapet.tokenize_stage.inspect import inspect
from mapet.tokenize_stage.quality.measure import stability
from mapet.tokenize_stage.quality.pictures import StorePictures
from mapet.tokenize_stage.quality.variants import StoredView, Variants
from mapet.tokenize_stage.tokenizers.opening import load_tokenizer
from PIL import Image

COUNT = 12


def measured(store: Path, images: Path, codebook: Path, count: int = COUNT) -> dict:
    return inspect(store, images=images, codebook=codebook, quality_images=count)["quality"]["pictures"]


@pytest.fixture(scope="module")
def pixel_chain(chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Codebook and store of clusters of raw pixels."""
    root = tmp_path_factory.mktemp("pixels")
    build_codebook(chain.tars[0], root / "book", tower="pixels:8", image_size=64, k=12, restarts=1, iterations=2)
    encode_shards(chain.tars[0], root / "book", root / "tokens")
    return root / "book", root / "tokens"


@pytest.fixture(scope="module")
def published(chain, vqkd_file, dvae_files, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Codebooks and stores of published tokenizers, by kind."""
    root, made = tmp_path_factory.mktemp("stores"), {}
    for kind, options in (("vqkd", {"vqkd": vqkd_file}), ("dvae", {"dvae": dvae_files["zip"], "image_size": 32})):
        import_tokenizer(root / kind, **options)
        encode_shards(chain.tars[0], root / kind, root / f"{kind} tokens")
        made[kind] = root / kind, root / f"{kind} tokens"
    return made


# Variants


@pytest.mark.parametrize(("crop", "flip"), [("center", False), ("random-resized", True)])
def test_variants_show_the_same_pixels_where_they_are_compared(crop: str, flip: bool):
    """Each patch's token is the sum of its pixels, which neither mirroring nor a shift changes."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8))
    preprocess = Preprocess(32, "shortest", 32, "bicubic", (0.5,) * 3, (0.5,) * 3)
    variants = Variants(preprocess, (8, 8), ViewPolicy(crop=crop))
    box = CropBox(3.0, 8.0, 60.0, 52.0)
    pixels = variants.pixels(image, StoredView(0, box, flip))
    view = center_view(image, preprocess) if crop == "center" else replay(image, box, flip, 32)
    assert np.array_equal(pixels[0], to_array(view))
    sums = pixels.reshape(4, 3, 8, 4, 8, 4).sum((1, 3, 5))[None]
    assert len(np.unique(sums[0, 0])) > 50
    for pairs, count in ((variants.mirrored(sums), 64), (variants.shifted(sums), 36)):
        assert pairs[0].shape == (1, count)
        assert np.array_equal(*pairs)


def test_a_patch_of_the_enlarged_view_contains_the_centre_of_the_patch_that_it_is_compared_with():
    """Tokens are places: 8 x 8 patches of 4 pixels; the enlarged view has 10 x 10, the crops start at 0 and at 2."""
    variants = Variants(Preprocess(32, "shortest", 32, "bicubic", (0.5,) * 3, (0.5,) * 3), (8, 8), ViewPolicy())
    tokens = np.broadcast_to(np.arange(64).reshape(8, 8), (1, 4, 8, 8))
    wanted = []
    for start in (0, 2):
        for row in range(8):
            for column in range(8):
                y, x = (int((place + 0.5) * 10 / 8) - start for place in (row, column))
                if 0 <= y < 8 and 0 <= x < 8:
                    wanted.append((8 * row + column, 8 * y + x))
    first, second = variants.rescaled(tokens)
    assert list(zip(first[0], second[0], strict=True)) == wanted


@pytest.mark.parametrize(("size", "grid"), [(32, (1, 1)), (30, (8, 8)), (32, (8, 4))])
def test_a_grid_that_cannot_be_shifted_by_whole_patches_has_no_such_figure(size: int, grid: tuple[int, int]):
    preprocess = Preprocess(size, "shortest", size, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert not Variants(preprocess, grid, ViewPolicy()).is_shiftable


def test_stability_is_what_its_formula_says():
    first = np.array([[1, 2], [3, 3], [1, 1]])
    second = np.array([[1, 1], [3, 4], [2, 1]])
    found = stability(first, second)
    # Rolled by one image, row 0 meets (2, 1), row 1 meets (1, 1), row 2 meets (3, 4): none is equal. Rolled by two, row
    # 0 meets (3, 4), row 1 meets (2, 1), row 2 meets (1, 1): both of row 2 are.
    assert (found["pairs"], found["equal"], found["share"]) == (6, 3, 0.5)
    assert found["chance"] == pytest.approx((0 + 2) / 6 / 2)
    assert found["adjusted"] == pytest.approx((0.5 - 1 / 6) / (5 / 6))
    assert stability(first[:1], second[:1])["chance"] is None


# Tokenizers


def test_what_is_measured_is_what_encoding_one_image_after_the_other_gives(chain, views_store: Path):
    tokenizer, equal = load_tokenizer(chain.codebook), {"flips": 0, "crops": 0}
    for store_path in (chain.tokens, views_store):
        store = TokenStore(store_path)
        views, stored, equal = StoredViews(store, chain.images), 0, {"flips": 0, "crops": 0}
        places = {(place.shard, place.row): place.view for place in choose_images(store, views.shards, COUNT, 0)}
        for shard, rows, indices in by_shard(store, places):
            for row in indices:
                view = places[shard, row]
                image, _ = read_image(views.record(shard, rows, row))
                box, flip = CropBox(*rows.crops[row, view]), bool(rows.flips[row, view])
                plain = replay(image, box, flip, 64)
                big = replay(image, box, flip, 80)
                shown = [plain, plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
                shown += [big.crop((0, 0, 64, 64)), big.crop((16, 16, 80, 80))]
                one, mirrored, upper, lower = tokenizer.encode(torch.from_numpy(np.stack(list(map(to_array, shown)))))
                equal["flips"] += int((one == mirrored.flip(1)).sum())
                equal["crops"] += int((upper[2:, 2:] == lower[:6, :6]).sum())
                stored += int((one.numpy() == rows.tokens[row, view]).sum())
        found = measured(store_path, chain.images, chain.codebook)
        assert found["images"] == COUNT
        assert found["as_stored"] == stored / (COUNT * 64) > 0.99
        for name, count in (("flips", COUNT * 64), ("crops", COUNT * 36)):
            assert found[name]["pairs"] == count
            # Another batch size may round one or two tokens differently.
            assert abs(found[name]["equal"] - equal[name]) <= 2
            assert found[name]["share"] > found[name]["chance"]


def test_pixels_do_not_depend_on_their_surroundings(chain, pixel_chain):
    book, tokens = pixel_chain
    found = measured(tokens, chain.images, book)
    assert found["crops"]["share"] == found["crops"]["adjusted"] == 1.0
    assert found["flips"]["share"] < 1
    assert found["scales"]["chance"] < found["scales"]["share"] < 1
    assert found["as_stored"] == 1


def features_of(codebook: Path, images: Path, tokens: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features (patches, dim) and tokens (patches,) of the centre views of all images of a tar."""
    tokenizer, store = load_tokenizer(codebook), TokenStore(tokens)
    views = StoredViews(store, images)
    ((name, rows),) = store.shards()
    pictures = [read_image(views.record(name, rows, row))[0] for row in range(len(rows))]
    pixels = np.stack([to_array(center_view(picture, tokenizer.preprocess)) for picture in pictures])
    features = tokenizer.features(torch.from_numpy(pixels)).numpy().astype(np.float64)
    return features.reshape(-1, tokenizer.dim), rows.tokens.reshape(-1)


@pytest.mark.parametrize("kind", ["pixels", "vqkd"])
def test_reconstruction_is_one_less_the_explained_variance(chain, pixel_chain, published, kind: str):
    book, tokens = pixel_chain if kind == "pixels" else published[kind]
    features, codes = features_of(book, chain.tars[0], tokens)
    if kind == "vqkd":
        features /= np.linalg.norm(features, axis=1, keepdims=True)
    centroids = load_tokenizer(book).codebook.centroids
    lost = np.mean([np.sum((one - centroids[code]) ** 2) for one, code in zip(features, codes, strict=True)])
    found = measured(tokens, chain.tars[0], book, 32)["reconstruction"]
    assert found["error"] == pytest.approx(lost / features.var(axis=0).sum(), rel=1e-4)
    assert (found["log2_probability"], found["reason"]) == (None, None)


def test_a_tokenizer_without_distances_tells_how_certain_it_is(chain, published):
    book, tokens = published["dvae"]
    features, codes = features_of(book, chain.tars[0], tokens)
    codebook = load_tokenizer(book).codebook
    weights = np.exp(features @ codebook.centroids.T.astype(np.float64) + codebook.bias)
    logs = np.log2(weights[np.arange(len(codes)), codes] / weights.sum(1))
    found = measured(tokens, chain.tars[0], book, 32)
    assert found["reconstruction"]["error"] is None
    assert "inner product" in found["reconstruction"]["reason"]
    assert found["reconstruction"]["log2_probability"] == pytest.approx(logs.mean(), rel=1e-5)
    assert -np.log2(24) < found["reconstruction"]["log2_probability"] < 0
    assert found["crops"]["share"] > found["crops"]["chance"]


def test_the_sample_is_seeded_and_as_large_as_the_store_at_most(chain, pixel_chain):
    book, tokens = pixel_chain
    options = {"images": chain.images, "codebook": book}
    one, again, other = (
        inspect(tokens, **options, quality_images=5, seed=seed)["quality"]["pictures"] for seed in (0, 0, 1)
    )
    assert one == again != other
    assert measured(tokens, chain.images, book, 5000)["images"] == 32
    assert measured(tokens, chain.images, book, 0) is None


def test_another_codebook_is_refused_before_any_image_is_read(chain, pixel_chain):
    with pytest.raises(FingerprintMismatch, match="was made with codebook"):
        StorePictures(TokenStore(chain.tokens), chain.images, pixel_chain[0])
