"""Purity, information and bigrams of tokens: hand-worked, by plain loops, and of chains whose entropy is known."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.tokens.rows import empty_rows, take_rows
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.counting.quality import quality_of
from mapet.tokenize_stage.counting.sample import ImageSample, SampledImages
from mapet.tokenize_stage.inspect import inspect


def sampled(tokens, labels=None, hashes=None) -> SampledImages:
    """tokens (n, V, H, W); the hash of image i is i unless given, so that it is in part i % 5."""
    tokens = np.asarray(tokens)
    n, views = tokens.shape[:2]
    return SampledImages(
        hashes=np.arange(n, dtype=np.uint64) if hashes is None else hashes,
        tokens=tokens,
        crops=np.tile([0.0, 0.0, 64.0, 64.0], (n, views, 1)),
        flips=np.zeros((n, views), bool),
        labels=np.full(n, -1) if labels is None else np.asarray(labels),
    )


# Hand-worked


def test_purity_of_four_images():
    """Codes 7, 8, 9: class 0 has 7 7 7 8, class 1 has 8 8 8 9."""
    tokens = np.array([[7, 7], [7, 8], [8, 8], [8, 9]]).reshape(4, 1, 1, 2)
    found = quality_of(sampled(tokens, [0, 0, 1, 1]), 10)["labels"]
    assert (found["classes"], found["images"], found["tokens"]) == (2, 4, 8)
    assert found["purity"]["value"] == (3 + 3 + 1) / 8
    assert found["class_purity"]["value"] == (3 + 3) / 8
    # The labels of one image further on are 1 0 0 1: class 0 has 7 8 8 8, class 1 has 7 7 8 9. Of two: 1 1 0 0, and of
    # three: 0 1 1 0, which are the first two with the classes exchanged.
    assert found["purity"]["chance"] == pytest.approx(((2 + 3 + 1) + (3 + 3 + 1) + (2 + 3 + 1)) / 8 / 3)
    assert found["class_purity"]["chance"] == pytest.approx(((3 + 2) + (3 + 3) + (3 + 2)) / 8 / 3)
    codes = -(3 / 8 * math.log2(3 / 8) + 1 / 2 * math.log2(1 / 2) + 1 / 8 * math.log2(1 / 8))
    pairs = -(2 * 3 / 8 * math.log2(3 / 8) + 2 * 1 / 8 * math.log2(1 / 8))
    assert found["information"]["bits"] == pytest.approx(codes + 1 - pairs)
    assert found["information"]["nmi"]["value"] == pytest.approx((codes + 1 - pairs) / ((codes + 1) / 2))
    purity = found["purity"]
    assert purity["adjusted"] == pytest.approx((purity["value"] - purity["chance"]) / (1 - purity["chance"]))


def test_a_bigram_model_of_five_images():
    """Images 0 to 2 fit, 3 chooses the concentration, 4 is measured; each is one row."""
    rows = [[1, 2, 1, 2], [1, 2, 2, 1], [2, 1, 2, 1], [1, 2, 1, 2], [2, 1, 2, 2]]
    found = quality_of(sampled(np.array(rows).reshape(5, 1, 1, 4)), 3)["bigrams"]
    assert found["vertical"] is None
    found = found["horizontal"]
    assert (found["pairs"], found["fitted_pairs"]) == (3, 9)
    # 12: 4 times, 21: 4 times, 22: once. Two of K = 3 codes occur on the right.
    unigram = {1: (4 + 2 / 3) / 11, 2: (5 + 2 / 3) / 11}
    assert found["unigram_bits"] == pytest.approx(-math.log2(unigram[1] * unigram[2] ** 2) / 3)
    c = found["concentration"]
    seen = {(1, 2): 4, (2, 1): 4, (2, 2): 1}
    of_left = {1: 4, 2: 5}
    measured = [(2, 1), (1, 2), (2, 2)]
    bits = [-math.log2((seen[a, b] + c * unigram[b]) / (of_left[a] + c)) for a, b in measured]
    assert found["bigram_bits"] == pytest.approx(sum(bits) / 3)
    assert found["gain_bits"] == found["unigram_bits"] - found["bigram_bits"]


# Plain loops


def key_hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")


def entropy(counts) -> float:
    whole = sum(counts)
    return -sum(count / whole * math.log2(count / whole) for count in counts)


def classes(images: list[tuple[int, np.ndarray]], by: int) -> tuple[float, float, float, float]:
    """Purity, class purity, mutual information and its normalised value of the labels `by` images before."""
    joint = Counter()
    for at, (_, tokens) in enumerate(images):
        joint.update((images[at - by][0], code) for code in tokens.reshape(-1).tolist())
    of_code, of_class = defaultdict(list), defaultdict(list)
    for (label, code), count in joint.items():
        of_code[code].append(count)
        of_class[label].append(count)
    whole = sum(joint.values())
    codes, labels = (entropy([sum(counts) for counts in part.values()]) for part in (of_code, of_class))
    mutual = codes + labels - entropy(joint.values())
    purity, class_purity = (sum(map(max, part.values())) / whole for part in (of_code, of_class))
    return purity, class_purity, mutual, mutual / ((codes + labels) / 2)


def bigram(images: list[tuple[int, np.ndarray]], k: int, vertical: bool, by: int = 0) -> dict:
    """`images` are (hash, tokens (V, H, W)); the left or upper token is that of the image `by` before."""
    parts = {"fit": [], "choose": [], "test": []}
    for at, (number, tokens) in enumerate(images):
        name = {3: "choose", 4: "test"}.get(number % 5, "fit")
        for view, other in zip(tokens, images[at - by][1], strict=True):
            grids = (view.T, other.T) if vertical else (view, other)
            for line, before in zip(*grids, strict=True):
                parts[name] += [(before[i], line[i + 1]) for i in range(len(line) - 1)]
    n, seen, left, right = len(parts["fit"]), Counter(parts["fit"]), Counter(), Counter()
    for a, b in parts["fit"]:
        left[a] += 1
        right[b] += 1

    def unigram(b) -> float:
        return (right[b] + len(right) / k) / (n + len(right))

    def bits(name: str, c: float) -> float:
        logs = [math.log2((seen[a, b] + c * unigram(b)) / (left[a] + c)) for a, b in parts[name]]
        return -sum(logs) / len(logs)

    best = min((4.0**power for power in range(-1, 12)), key=lambda c: bits("choose", c))
    alone = -sum(math.log2(unigram(b)) for _, b in parts["test"]) / len(parts["test"])
    return {"pairs": len(parts["test"]), "fitted_pairs": n, "concentration": best,
            "unigram_bits": alone, "bigram_bits": bits("test", best)}  # fmt: skip


@pytest.mark.parametrize("name", ["tokens", "views"])
def test_figures_of_a_store_are_what_loops_compute(chain, views_store: Path, name: str):
    path = chain.tokens if name == "tokens" else views_store
    store, found = TokenStore(path), inspect(path)["quality"]
    images = [(key_hash(key), one.labels, one.tokens) for _, rows in store.shards()
              for at, key in enumerate(rows.keys) for one in [row_of(rows, at)]]  # fmt: skip
    images.sort(key=lambda image: image[0])
    assert (found["images"], found["tokens"]) == (96, sum(tokens.size for *_, tokens in images))
    labelled = [(label, tokens) for _, label, tokens in images]
    own, *others = (classes(labelled, by) for by in range(4))
    scores = found["labels"]
    for figure, at in ((scores["purity"], 0), (scores["class_purity"], 1), (scores["information"]["nmi"], 3)):
        chance = sum(other[at] for other in others) / 3
        assert figure == pytest.approx(
            {"value": own[at], "chance": chance, "adjusted": (own[at] - chance) / (1 - chance)}, abs=1e-9
        )
    assert scores["information"]["bits"] == pytest.approx(own[2])
    assert scores["information"]["chance_bits"] == pytest.approx(sum(other[2] for other in others) / 3)
    hashed = [(number, tokens) for number, _, tokens in images]
    for way, vertical in (("horizontal", False), ("vertical", True)):
        wanted, unrelated = (bigram(hashed, store.k, vertical, by) for by in (0, 1))
        gain = wanted["unigram_bits"] - wanted["bigram_bits"]
        chance = unrelated["unigram_bits"] - unrelated["bigram_bits"]
        wanted |= {"gain_bits": gain, "share": gain / wanted["unigram_bits"], "chance_bits": chance}
        assert found["bigrams"][way] == pytest.approx(wanted, abs=1e-9)


def row_of(rows, at: int):
    taken = take_rows(rows, [at])
    return replace(taken, tokens=taken.tokens[0], labels=int(taken.labels[0]))


# Known entropies


def chains(images: int, side: int, transitions: np.ndarray, seed: int = 0) -> np.ndarray:
    """Images whose rows are independent Markov chains in their stationary state: (n, 1, side, side)."""
    random = np.random.default_rng(seed)
    states = np.linalg.matrix_power(transitions, 200)[0].cumsum()
    tokens = np.empty((images, 1, side, side), np.uint16)
    tokens[..., 0] = np.searchsorted(states, random.random((images, 1, side)))
    steps = transitions.cumsum(1)
    for left, right in pairwise(range(side)):
        draws = random.random((images, 1, side, 1))
        tokens[..., right] = (draws > steps[tokens[..., left]]).sum(-1)
    return np.minimum(tokens, len(transitions) - 1)


def test_the_gain_of_a_markov_chain_is_its_entropy_less_its_entropy_rate():
    transitions = np.random.default_rng(1).dirichlet(np.full(12, 0.2), 12)
    found = quality_of(sampled(chains(1500, 10, transitions)), 12)["bigrams"]
    stationary = np.linalg.matrix_power(transitions, 200)[0]
    alone = entropy(stationary)
    rate = sum(share * entropy(row[row > 0]) for share, row in zip(stationary, transitions, strict=True))
    assert alone - rate > 1
    assert found["horizontal"]["unigram_bits"] == pytest.approx(alone, rel=0.01)
    assert found["horizontal"]["bigram_bits"] == pytest.approx(rate, rel=0.01)
    assert found["horizontal"]["share"] == pytest.approx((alone - rate) / alone, rel=0.01)
    assert found["horizontal"]["chance_bits"] == pytest.approx(0, abs=0.005)
    assert found["vertical"]["gain_bits"] == pytest.approx(0, abs=0.005)


def test_what_the_place_alone_tells_is_chance():
    """A token is the number of its column: the neighbour tells everything, and so does that of another image."""
    tokens = np.broadcast_to(np.arange(8), (40, 1, 8, 8))
    found = quality_of(sampled(tokens), 8)["bigrams"]
    assert found["horizontal"]["gain_bits"] > 2.5
    assert found["horizontal"]["chance_bits"] == found["horizontal"]["gain_bits"]
    assert found["vertical"]["gain_bits"] > 2.5


def test_one_code_for_all_leaves_nothing_to_tell():
    found = quality_of(sampled(np.zeros((20, 1, 4, 4), np.uint16), np.arange(20) % 2), 4)
    assert found["bigrams"]["horizontal"]["unigram_bits"] < 0.02
    assert found["bigrams"]["horizontal"]["gain_bits"] == pytest.approx(0, abs=0.02)
    labels = found["labels"]
    assert labels["purity"] == {"value": 0.5, "chance": 0.5, "adjusted": 0.0}
    assert labels["class_purity"] == {"value": 1.0, "chance": 1.0, "adjusted": None}
    assert labels["information"]["bits"] == 0
    one_class = quality_of(sampled(np.zeros((20, 1, 4, 4), np.uint16), np.zeros(20, int)), 4)["labels"]
    assert one_class["information"] is None


def test_too_few_images_have_no_bigrams_and_no_chance():
    found = quality_of(sampled(np.ones((1, 1, 4, 4), np.uint16), [3]), 4)
    assert found["bigrams"] == {"horizontal": None, "vertical": None}
    assert found["labels"]["purity"] == {"value": 1.0, "chance": None, "adjusted": None}
    assert quality_of(sampled(np.ones((8, 1, 1, 1), np.uint16)), 4)["bigrams"]["horizontal"] is None


# Properties


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 200))
def test_relabelling_codes_and_classes_changes_nothing(seed: int, k: int):
    random = np.random.default_rng(seed)
    tokens, labels = random.integers(0, k, (30, 2, 4, 5)), random.integers(-1, 4, 30)
    codes, names = random.permutation(k), random.permutation(4)
    found = quality_of(sampled(tokens, labels), k)
    renamed = np.where(labels < 0, -1, names[labels])
    again = quality_of(sampled(codes[tokens].astype(np.uint32), renamed), k)
    assert flattened(again) == pytest.approx(flattened(found), abs=1e-9)


def flattened(figures, where: str = "") -> dict:
    if not isinstance(figures, dict):
        return {where: 0.0 if figures is None else figures}
    return {name: value for key, part in figures.items() for name, value in flattened(part, f"{where}.{key}").items()}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 30, 1000]))
def test_random_tokens_tell_nothing_beyond_chance(seed: int, k: int):
    random = np.random.default_rng(seed)
    found = quality_of(sampled(random.integers(0, k, (400, 1, 8, 8)), random.integers(0, 5, 400)), k)
    for way in ("horizontal", "vertical"):
        assert -0.02 < found["bigrams"][way]["gain_bits"] < 0.02
    for name in ("purity", "class_purity"):
        assert found["labels"][name]["adjusted"] == pytest.approx(0, abs=0.02)
    assert found["labels"]["information"]["nmi"]["adjusted"] == pytest.approx(0, abs=0.01)


def test_purity_rises_with_k_and_adjusted_purity_does_not():
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 100)
    few, many = (
        quality_of(sampled(random.integers(0, k, (100, 1, 8, 8)), labels), k)["labels"]["purity"] for k in (4, 4000)
    )
    assert many["value"] > few["value"] + 0.3
    assert abs(many["adjusted"]) < 0.02
    assert abs(few["adjusted"]) < 0.02


def test_codes_may_be_as_many_as_31_bits_hold():
    random = np.random.default_rng(0)
    codes = random.choice(2**31 - 1, 500, replace=False).astype(np.uint32)
    small = random.integers(0, 500, (800, 1, 6, 6))
    big = quality_of(sampled(codes[small], np.arange(800) % 3), 2**31)
    labels = quality_of(sampled(small, np.arange(800) % 3), 500)["labels"]
    assert flattened(big["labels"]) == pytest.approx(flattened(labels))
    bits = big["bigrams"]["horizontal"]
    assert math.log2(500) < bits["unigram_bits"] < math.log2(500) + 0.2
    assert abs(bits["gain_bits"]) < 0.02


# The sample


class FewFields:
    """What `ImageSample` reads of a store."""

    views, grid = 1, (2, 2)


def rows_of(keys: list[str]):
    tokens = np.array([[[[key_hash(key) % 7] * 2] * 2] for key in keys], np.uint32).reshape(-1, 1, 2, 2)
    rows = empty_rows(1, (2, 2))
    filled = {"crops": np.ones((len(keys), 1, 4)), "flips": np.zeros((len(keys), 1), bool)}
    return replace(rows, keys=np.array(keys, object), tokens=tokens, labels=np.arange(len(keys)) % 3, **filled)


@pytest.mark.parametrize("order", [lambda parts: parts, lambda parts: parts[::-1]])
def test_the_sample_is_the_images_with_the_smallest_hashes_in_any_order(order: Callable):
    keys = [f"image {number}" for number in range(1000)]
    parts = order([keys[start : start + 70] for start in range(0, 1000, 70)])
    sample = ImageSample(FewFields(), most_tokens=400)
    for part in parts:
        sample.add(rows_of(part))
        assert sum(len(kept[0]) for kept in sample._parts) <= 2 * 100 + 70
    images = sample.images()
    smallest = sorted(map(key_hash, keys))[:100]
    assert images.hashes.tolist() == smallest
    assert images.tokens[:, 0, 1, 1].tolist() == [number % 7 for number in smallest]


def test_class_names_are_one_class_in_all_shards():
    sample = ImageSample(FewFields())
    sample.add(replace(rows_of(["a", "b"]), labels=np.array([0, 1]), classes=("cat", "dog")))
    sample.add(replace(rows_of(["c", "d"]), labels=np.array([0, -1]), classes=("dog",)))
    by_key = dict(zip(sample.images().hashes.tolist(), sample.images().labels.tolist(), strict=True))
    labels = [by_key[key_hash(key)] for key in "abcd"]
    assert labels[1] == labels[2] != labels[0]
    assert labels[3] == -1
