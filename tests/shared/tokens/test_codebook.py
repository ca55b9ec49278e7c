"""Codebooks: saved and loaded unchanged, changes are detected, and the nearest centroid is measured."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.errors import DataError
from mapet.shared.tokens.code_usage import usage
from mapet.shared.tokens.codebook import TOKEN_FIELDS, Codebook, read_description

DESCRIPTION = {
    "library": "open_clip",
    "architecture": {"class": "VisionTransformer", "layers": ["GELU"]},
    "weights_sha256": "ab" * 32,
    "layer": -1,
    "final_norm": False,
    "precision": "float32",
    "preprocess": {
        "image_size": 64,
        "resize": "shortest",
        "resize_size": 64,
        "interpolation": "bicubic",
        "mean": [0.5, 0.25, 0.125],
        "std": [0.5, 0.25, 0.125],
    },
    "grid": [4, 6],
    "metric": "l2",
    "tower": "local-dir:somewhere",
    "pretrained": None,
    "image_size": None,
    "seed": 0,
    "k": 24,
    "dim": 10,
    "sample": {"images": 3, "patches": 72},
    "versions": {"faiss": "1.15.1"},
    "objective": [[3.5, 2.25]],
}


def make(description: dict = DESCRIPTION, seed: int = 0, k: int = 24, dim: int = 10) -> Codebook:
    rng = np.random.default_rng(seed)
    return Codebook(rng.normal(size=(k, dim)).astype(np.float32), rng.integers(0, 9, k), copy.deepcopy(description))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save(tmp_path / "book")
    return tmp_path / "book"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_codebook_is_loaded_as_it_was_saved(saved: Path):
    before, after = make(), Codebook.load(saved)
    assert after.centroids.dtype == np.float32
    assert np.array_equal(after.centroids, before.centroids)
    assert np.array_equal(after.counts, before.counts)
    assert after.description == before.description
    assert after.fingerprint == before.fingerprint
    assert (after.k, after.grid) == (24, (4, 6))


def test_saving_again_gives_the_same_bytes(saved: Path, tmp_path: Path):
    make().save(tmp_path / "again")
    Codebook.load(saved).save(tmp_path / "copy")
    assert set(contents(saved)) == {"codebook.json", "centroids.safetensors"}
    assert contents(saved) == contents(tmp_path / "again") == contents(tmp_path / "copy")


def other_value(value):
    if isinstance(value, dict):
        return {**value, "more": 1}
    if isinstance(value, list):
        return [*value, 5]
    if value is None:
        return 5
    return not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else value + 1


def test_the_fields_that_change_tokens():
    others = {"tower", "pretrained", "image_size", "seed", "k", "dim", "sample", "versions", "objective"}
    assert set(TOKEN_FIELDS) == set(DESCRIPTION) - others


@pytest.mark.parametrize("name", TOKEN_FIELDS)
def test_the_fingerprint_changes_with_every_field_that_changes_tokens(name: str):
    assert make({**DESCRIPTION, name: other_value(DESCRIPTION[name])}).fingerprint != make().fingerprint


@pytest.mark.parametrize("name", sorted(set(DESCRIPTION) - set(TOKEN_FIELDS)))
def test_the_fingerprint_does_not_change_with_other_fields(name: str):
    assert make({**DESCRIPTION, name: other_value(DESCRIPTION[name])}).fingerprint == make().fingerprint


def test_the_fingerprint_changes_with_any_bit_of_the_centroids_and_not_with_counts():
    book = make()
    centroids = book.centroids.copy()
    centroids.view(np.uint32)[-1, -1] ^= 1
    assert Codebook(centroids, book.counts, book.description).fingerprint != book.fingerprint
    assert Codebook(book.centroids, book.counts + 1, book.description).fingerprint == book.fingerprint
    swapped = Codebook(book.centroids[::-1].copy(), book.counts, book.description)
    assert swapped.fingerprint != book.fingerprint


@pytest.mark.parametrize("name", ["codebook.json", "centroids.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_is_a_data_error_that_names_the_file(saved: Path, name: str, share: float):
    data = bytearray((saved / name).read_bytes())
    data[int(share * len(data))] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        Codebook.load(saved)


@pytest.mark.parametrize("name", ["codebook.json", "centroids.safetensors"])
def test_a_missing_or_truncated_file_is_a_data_error_that_names_it(saved: Path, name: str):
    (saved / name).write_bytes((saved / name).read_bytes()[:50])
    with pytest.raises(DataError, match=name):
        Codebook.load(saved)
    (saved / name).unlink()
    with pytest.raises(DataError, match=name):
        Codebook.load(saved)


def test_centroids_of_another_codebook_are_a_data_error(saved: Path, tmp_path: Path):
    make(seed=1).save(tmp_path / "other")
    (saved / "centroids.safetensors").write_bytes((tmp_path / "other/centroids.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"centroids\.safetensors was changed"):
        Codebook.load(saved)


def test_a_missing_folder_is_a_data_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        Codebook.load(tmp_path / "nowhere")


def test_the_description_can_be_read_without_the_centroids(saved: Path):
    (saved / "centroids.safetensors").unlink()
    description = read_description(saved / "codebook.json")
    assert description["fingerprint"] == make().fingerprint
    assert {name: description[name] for name in DESCRIPTION} == DESCRIPTION


@pytest.mark.parametrize("rows", [1, 7, 500])
def test_assign_finds_the_nearest_centroid(rows: int):
    book = make()
    features = np.random.default_rng(rows).normal(size=(rows, 10)).astype(np.float32)
    squared = ((features[:, None].astype(np.float64) - book.centroids[None]) ** 2).sum(-1)
    tokens, distances = book.assign(features)
    assert tokens.dtype == np.uint16
    assert np.array_equal(tokens, squared.argmin(1))
    assert np.allclose(distances, squared.min(1), rtol=1e-4)


def test_tokens_reach_the_last_code_of_the_largest_codebook():
    centroids = np.zeros((65_536, 1), dtype=np.float32)
    centroids[:, 0] = np.arange(65_536)
    tokens, _ = Codebook(centroids, np.zeros(65_536, dtype=np.int64), {}).assign(np.float32([[65_535.2], [0.1]]))
    assert tokens.tolist() == [65_535, 0]


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "faiss":
            raise ImportError("No module named 'faiss'")

sys.meta_path.insert(0, Blocker())
from mapet.shared.tokens.codebook import import_faiss
from mapet.shared.errors import UsageError
try:
    import_faiss()
except UsageError as error:
    print(error)
"""


def test_without_faiss_the_error_says_what_to_install():
    ran = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    (line,) = ran.stdout.splitlines()
    assert "faiss is not usable here" in line
    assert 'pip install "mapet[cpu]"' in line


def entropy_bits(counts: list[int]) -> float:
    total = sum(counts)
    return sum(count / total * math.log2(total / count) for count in counts if count)


def test_usage_of_known_counts():
    assert usage(np.array([4, 4, 0, 0])) == {
        "codes": 4,
        "used": 2,
        "dead": 2,
        "entropy_bits": 1.0,
        "perplexity": 2.0,
    }


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=60).filter(any))
def test_usage_equals_its_definition_and_is_within_bounds(counts: list[int]):
    measured = usage(np.array(counts))
    assert measured["codes"] == len(counts)
    assert measured["used"] == sum(count > 0 for count in counts)
    assert measured["used"] + measured["dead"] == measured["codes"]
    assert measured["entropy_bits"] == pytest.approx(entropy_bits(counts), abs=1e-9)
    assert measured["perplexity"] == pytest.approx(2 ** measured["entropy_bits"])
    assert 1 <= measured["perplexity"] <= measured["used"] * (1 + 1e-9)


def test_usage_of_no_tokens_does_not_divide_by_zero():
    measured = usage(np.zeros(5, dtype=np.int64))
    assert (measured["used"], measured["dead"], measured["entropy_bits"]) == (0, 5, 0.0)
