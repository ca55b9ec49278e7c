"""inspect A --against B: drift of usage, keys, equal tokens, matched centroids; and what cannot be compared."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.errors import DataError, UsageError
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import ShardRows, take_rows
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.inspect import inspect, show
from mapet.tokenize_stage.inspection import compare as against


def test_a_store_has_not_changed_against_itself(chain, views_store: Path):
    for store in (chain.tokens, views_store):
        about = inspect(store, against=store)
        found = about["against"]
        assert found["same_codebook"]
        assert found["keys"] == {"common": 96, "only_here": 0, "only_there": 0}
        assert found["drift"] == {"total_variation": 0, "jensen_shannon": 0, "appeared": [], "vanished": []}
        assert (found["tokens"]["share"], found["tokens"]["equal_images"]) == (1, 96)
        assert np.array_equal(found["tokens"]["share_by_position"], np.ones((8, 8)))
        assert (found["not_compared"], about["warnings"]) == ([], [])


def test_drift_is_what_its_formulas_say(chain, faulty):
    """The commonest code became another one everywhere, and one shard lost half of its images."""

    def change(rows: ShardRows) -> ShardRows:
        rows = replace(rows, tokens=np.where(rows.tokens == top, (top + 1) % 16, rows.tokens).astype(np.uint16))
        return take_rows(rows, range(16)) if rows.keys[0] == first else rows

    before = TokenStore(chain.tokens).to_numpy()
    top = int(np.bincount(before.reshape(-1)).argmax())
    first = next(iter(TokenStore(chain.tokens)))
    store = faulty(chain.tokens, change)
    after = TokenStore(store).to_numpy()
    about = inspect(store, against=chain.tokens)
    found = about["against"]
    p, q = (np.bincount(tokens.reshape(-1), minlength=16) / tokens.size for tokens in (after, before))
    divergence = 0.0
    for here, there in zip(p, q, strict=True):
        for share in (here, there):
            divergence += share * np.log2(share / ((here + there) / 2)) / 2 if share else 0
    assert found["drift"]["total_variation"] == pytest.approx(sum(abs(p - q)) / 2)
    assert found["drift"]["jensen_shannon"] == pytest.approx(divergence**0.5)
    assert (found["drift"]["appeared"], found["drift"]["vanished"]) == ([], [top])
    assert found["keys"] == {"common": 80, "only_here": 0, "only_there": 16}
    common = np.concatenate([before[:16], before[32:]])
    assert found["tokens"]["equal"] == int((common == after).sum())
    assert found["tokens"]["compared"] == after.size
    assert found["tokens"]["equal_images"] == int((common == after).all((1, 2, 3)).sum())
    assert found["tokens"]["share_by_position"] == pytest.approx((common == after)[:, 0].mean(0))
    assert [one["sign"] for one in about["warnings"]] == ["tokens-differ"]


@pytest.mark.parametrize(
    ("sign", "change"),
    [
        ("next", lambda rows: replace(rows, tokens=np.roll(rows.tokens, -1, axis=0))),
        ("previous", lambda rows: replace(rows, tokens=np.roll(rows.tokens, 1, axis=0))),
        ("mirrored", lambda rows: replace(rows, tokens=rows.tokens[..., ::-1].copy())),
        ("transposed", lambda rows: replace(rows, tokens=rows.tokens.swapaxes(2, 3).copy())),
    ],
)
def test_a_fault_is_named_by_comparing_with_a_sound_store(chain, faulty, sign: str, change, capsys):
    about = inspect(faulty(chain.tokens, change), against=chain.tokens)
    (warning,) = about["warnings"]
    assert warning["sign"] == sign
    assert "100.0% if that is undone" in warning["why"]
    show(about)
    assert f"Warning ({sign})" in capsys.readouterr().out


def test_a_part_of_the_images_is_compared_where_all_would_be_too_many(chain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(against, "_MOST_TOKENS", 64 * 20)
    found = inspect(chain.tokens, against=chain.tokens)["against"]
    assert found["tokens"]["sampled_every"] == 5
    assert found["tokens"]["images"] == 20  # every fifth of 96, from the first on
    assert found["tokens"]["share"] == 1
    assert found["keys"]["common"] == 96


def test_views_are_compared_where_crop_and_flip_are_the_same(chain, views_store: Path, tmp_path: Path):
    found = inspect(views_store, against=chain.tokens)["against"]
    assert found["tokens"] is None
    assert found["not_compared"] == ["tokens: 96 views of common images have another crop or flip there"]
    encode_shards(chain.tars[0], chain.codebook, tmp_path / "two", crop="random-resized", views=2)
    found = inspect(views_store, against=tmp_path / "two")["against"]
    assert (found["tokens"]["views"], found["tokens"]["share"]) == (64, 1)
    assert found["keys"] == {"common": 32, "only_here": 64, "only_there": 0}


def test_of_another_codebook_it_says_what_is_not_compared(chain, tower: str, tmp_path: Path, capsys):
    build_codebook(chain.images, tmp_path / "book", tower=tower, k=9, iterations=2, restarts=1, layer=0)
    encode_shards(chain.tars[0], tmp_path / "book", tmp_path / "tokens")
    about = inspect(chain.tokens, against=tmp_path / "tokens")
    found = about["against"]
    assert (found["same_codebook"], found["drift"], found["tokens"]) == (False, None, None)
    assert "are two codebooks (they differ in layer)" in found["not_compared"][0]
    assert found["usage"]["there"]["codes"] == 9
    show(about)
    assert "not compared" in capsys.readouterr().out
    books = inspect(chain.codebook, against=tmp_path / "book")["against"]
    assert books["centroids"] is None
    assert books["not_compared"][-1].startswith("centroids: they belong to different features")


def test_centroids_are_matched_by_distance_whatever_their_numbers(chain, tmp_path: Path, capsys):
    book = Codebook.load(chain.codebook)
    order = np.random.default_rng(0).permutation(16)
    centroids = book.centroids[order]
    centroids[2] += 100
    replace(book, centroids=centroids, counts=book.counts[order]).save(tmp_path / "other")
    about = inspect(chain.codebook, against=tmp_path / "other")
    found = about["against"]["centroids"]
    back = np.argsort(order)
    far = int(order[2])
    assert [code for number, code in enumerate(found["nearest"]) if number != far] == np.delete(back, far).tolist()
    assert (found["equal"], found["mutual"]) == (15, 15)
    assert found["same_number"] == sum(at == code for at, code in enumerate(found["nearest"]))
    assert found["moved"] == 1
    assert found["distance"]["min"] == 0
    show(about)
    assert "15 of 16" in capsys.readouterr().out
    itself = inspect(chain.codebook, against=chain.codebook)["against"]
    assert itself["same_codebook"]
    assert (itself["centroids"]["equal"], itself["centroids"]["same_number"], itself["centroids"]["moved"]) == (
        16,
        16,
        0,
    )


def test_unlike_things_are_not_compared(chain, tmp_path: Path):
    with pytest.raises(UsageError, match=r"--against .*codebook is a codebook and .*tokens is a token store"):
        inspect(chain.tokens, against=chain.codebook)
    with pytest.raises(UsageError, match=r"--against .*tokens is a token store and .*codebook is a codebook"):
        inspect(chain.codebook, against=chain.tokens)
    with pytest.raises(DataError, match="neither a codebook nor a token store"):
        inspect(chain.codebook, against=tmp_path / "nowhere")
    with pytest.raises(DataError, match="neither a codebook nor a token store"):
        inspect(chain.tokens, against=tmp_path / "nowhere")
