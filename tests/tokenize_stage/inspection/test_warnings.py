"""What is wrong with a store is said in words: shifted, mirrored, scrambled, collapsed; a sound one is silent."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.errors import DataError
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import ShardRows, take_rows
from mapet.tokenize_stage.inspect import inspect, show
from mapet.tokenize_stage.inspection.faults import store_findings
from mapet.tokenize_stage.inspection.warnings import as_warnings
from mapet.tokenize_stage.verify import verify

Change = Callable[[ShardRows], ShardRows]


def shifted(rows: ShardRows) -> ShardRows:
    """Each image has the tokens of the next one."""
    return replace(rows, tokens=np.roll(rows.tokens, -1, axis=0))


def shifted_back(rows: ShardRows) -> ShardRows:
    return replace(rows, tokens=np.roll(rows.tokens, 1, axis=0))


def mirrored(rows: ShardRows) -> ShardRows:
    return replace(rows, tokens=rows.tokens[..., ::-1].copy())


def flips_ignored(rows: ShardRows) -> ShardRows:
    return replace(rows, tokens=np.where(rows.flips[:, :, None, None], rows.tokens[..., ::-1], rows.tokens))


def transposed(rows: ShardRows) -> ShardRows:
    return replace(rows, tokens=rows.tokens.swapaxes(2, 3).copy())


def scrambled(rows: ShardRows) -> ShardRows:
    order = np.random.default_rng(5).permutation(64)
    return replace(rows, tokens=rows.tokens.reshape(*rows.tokens.shape[:2], 64)[..., order].reshape(rows.tokens.shape))


def collapsed(rows: ShardRows) -> ShardRows:
    """One code but for one patch in a hundred."""
    tokens = np.where(np.arange(rows.tokens.size).reshape(rows.tokens.shape) % 100, 3, rows.tokens)
    return replace(rows, tokens=tokens.astype(np.uint16))


def same_everywhere(rows: ShardRows) -> ShardRows:
    one = np.random.default_rng(5).integers(0, 16, rows.tokens.shape[2:]).astype(np.uint16)
    return replace(rows, tokens=np.where(rows.tokens == 2, rows.tokens, one).astype(np.uint16))


FAULTS = {
    "next": (shifted, "the tokens of each image are those of the next image"),
    "previous": (shifted_back, "the tokens of each image are those of the image before"),
    "mirrored": (mirrored, "the tokens are mirrored left to right"),
    "flips-ignored": (flips_ignored, "flips were not applied"),
    "transposed": (transposed, "rows and columns of the token grids are swapped"),
}


def signs(about: dict) -> list[str]:
    return [warning["sign"] for warning in about["warnings"]]


def lower(text: str) -> str:
    return " ".join(text.lower().split())


@pytest.mark.parametrize("sign", FAULTS)
def test_views_that_overlap_tell_without_any_reference(views_store: Path, faulty, sign: str, capsys):
    change, words = FAULTS[sign]
    about = inspect(faulty(views_store, change))
    assert signs(about) == [sign]
    show(about)
    said = lower(capsys.readouterr().out)
    assert f"warning ({sign}): most likely" in said
    assert words in said
    assert "why: where two views of an image overlap, their codes agree in" in said
    assert "what to do: `mapet tokenize verify" in said


@pytest.mark.parametrize(("change", "sign"), [(collapsed, "collapsed"), (same_everywhere, "same-everywhere")])
@pytest.mark.parametrize("views", [1, 3])
def test_codes_that_see_nothing_are_told_by_their_usage(
    chain, views_store: Path, faulty, change, sign: str, views: int
):
    about = inspect(faulty(chain.tokens if views == 1 else views_store, change))
    assert signs(about) == [sign]


def test_the_words_for_a_collapsed_codebook_say_how_many_codes_have_it_all(chain, faulty, capsys):
    show(inspect(faulty(chain.tokens, collapsed)))
    said = lower(capsys.readouterr().out)
    assert "warning (collapsed): the codebook has collapsed: 1 of 16 codes have 90 % of all patches." in said
    assert "perplexity is 1.1 of 16" in said


def test_a_collapsed_codebook_is_told_by_itself(chain, tmp_path: Path):
    book = Codebook.load(chain.codebook)
    replace(book, counts=np.array([5000, *[3] * 15])).save(tmp_path / "book")
    assert signs(inspect(tmp_path / "book")) == ["collapsed"]


def test_equal_centroids_are_told(chain, tmp_path: Path):
    book = Codebook.load(chain.codebook)
    centroids = book.centroids.copy()
    centroids[3:7] = centroids[2]
    replace(book, centroids=centroids).save(tmp_path / "book")
    about = inspect(tmp_path / "book")
    assert signs(about) == ["twins"]
    assert about["distances"]["twins"] == 5
    assert about["distances"]["nearest"]["min"] == 0


def test_one_code_that_has_most_patches_is_told(chain, faulty):
    def mostly_ground(rows: ShardRows) -> ShardRows:
        tokens = np.where(np.arange(rows.tokens.size).reshape(rows.tokens.shape) % 10 < 6, 9, rows.tokens)
        return replace(rows, tokens=tokens.astype(np.uint16))

    (warning,) = (one for one in inspect(faulty(chain.tokens, mostly_ground))["warnings"] if one["sign"] == "dominated")
    assert warning["what"].startswith("Code 9 alone has 6")


def test_patches_in_another_order_are_told(chain, faulty):
    assert signs(inspect(faulty(chain.tokens, scrambled))) == ["scrambled"]


def labelled(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (count, 1, 8, 8) that depend on the class and are alike where patches touch; and the classes."""
    labels = random.integers(0, 8, count)
    coarse = random.integers(0, 8, (count, 1, 4, 4)) + 8 * (labels[:, None, None, None] % 2)
    return coarse.repeat(2, axis=2).repeat(2, axis=3).astype(np.uint16), labels


@pytest.mark.parametrize("sign", ["next", "previous"])
def test_labels_tell_a_shift_of_a_store_of_one_view(chain, faulty, sign: str):
    tokens, labels = labelled(np.random.default_rng(0), 400)

    def make(rows: ShardRows) -> ShardRows:
        many = take_rows(rows, np.arange(400) % len(rows))
        keys = np.array([f"{rows.keys[0]}-{number}" for number in range(400)], dtype=object)
        return replace(many, keys=keys, tokens=tokens, labels=labels)

    assert signs(inspect(faulty(chain.tokens, make))) == []
    about = inspect(faulty(chain.tokens, lambda rows: FAULTS[sign][0](make(rows))))
    assert signs(about) == [sign]
    assert "codes say less about the class of their own image" in about["warnings"][0]["why"]


def test_a_store_without_images_or_labels_is_not_suspicious(chain, faulty):
    none = inspect(faulty(chain.tokens, lambda rows: take_rows(rows, [])))
    assert (none["tokens"], none["labels"], none["warnings"]) == (0, None, [])
    assert none["neighbours"]["horizontal"] == {"pairs": 0, "equal": 0, "share": None, "chance": None}
    few = inspect(faulty(chain.tokens, lambda rows: replace(take_rows(rows, [0]), labels=np.array([-1]))))
    assert (few["images"], few["labels"], few["warnings"]) == (3, None, [])
    assert store_findings(few) == []


def test_a_fault_must_fit_clearly_better_than_what_is_stored(views_store: Path):
    figures = inspect(views_store)

    def found(labels: dict, overlaps: dict) -> list[str]:
        changed = {
            **figures,
            "labels": {**figures["labels"], "nmi_by_offset": figures["labels"]["nmi_by_offset"] | labels},
            "overlaps": {**figures["overlaps"], "supposing": figures["overlaps"]["supposing"] | overlaps},
        }
        return [one["sign"] for one in as_warnings(store_findings(changed))]

    chance = {"7": 0.1, "13": 0.1, "29": 0.1, "-1": 0.1}
    assert found({**chance, "0": 0.5, "1": 0.6}, {}) == []  # neighbours of one class
    assert found({**chance, "0": 0.11, "1": 0.6}, {}) == ["next"]
    stored = figures["overlaps"]["supposing"]["as-stored"]
    for gain, signs_then in ((1.1, []), (1.3, ["mirrored"])):
        share = stored["chance"] + gain * (stored["share"] - stored["chance"])
        mirror = {**stored, "share": share, "sigmas": 9.0}
        assert found({}, {"mirrored": mirror}) == signs_then
        assert found({}, {"mirrored": {**mirror, "sigmas": 4.0}}) == []


# What verify --reencode says


@pytest.mark.parametrize("sign", FAULTS)
def test_encoding_again_says_which_fault_explains_the_difference(chain, views_store: Path, faulty, sign: str):
    change, words = FAULTS[sign]
    store = faulty(views_store if sign == "flips-ignored" else chain.tokens, change)
    with pytest.raises(DataError) as error:
        verify(store, codebook=chain.codebook, images=str(chain.images), reencode=12)
    said = lower(str(error.value))
    assert words in said.split("the first: ")[1].split(" (")[0]
    assert "100.0% if that is undone" in said


def test_tokens_that_no_fault_explains_are_told_as_before(chain, faulty):
    store = faulty(chain.tokens, lambda rows: replace(rows, tokens=(rows.tokens + 1) % 16))
    with pytest.raises(DataError, match=r"the first: .*: image '.*' has 64 of 64 other tokens"):
        verify(store, codebook=chain.codebook, images=str(chain.images), reencode=5)
