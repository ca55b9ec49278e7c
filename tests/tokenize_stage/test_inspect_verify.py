"""inspect counts what is there; verify finds whatever was changed after it was written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.codebook import Codebook
from mapet.shared.errors import DataError, FingerprintMismatch, UsageError
from mapet.shared.files import write_sealed_json
from mapet.shared.sources import open_source
from mapet.shared.token_store import ShardRows, TokenStore, read_entry, write_manifest, write_shard
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.inspect import inspect, show
from mapet.tokenize_stage.verify import verify

SOURCE_FIELDS = ("codebook_fingerprint", "view", "source")


def all_tokens(store: Path) -> np.ndarray:
    return np.concatenate([rows.tokens for _, rows in TokenStore(store).shards()])


def entropy_of(tokens: np.ndarray) -> float:
    _, counts = np.unique(tokens, return_counts=True)
    return float(-(counts / counts.sum() * np.log2(counts / counts.sum())).sum())


# inspect


def test_inspect_counts_the_tokens_of_a_store(chain):
    tokens, about = all_tokens(chain.tokens), inspect(chain.tokens)
    codes, counts = np.unique(tokens, return_counts=True)
    assert about["kind"] == "token store"
    assert (about["images"], about["labelled"], about["views"], about["shards"]) == (96, 96, 96, 3)
    assert about["tokens"] == tokens.size == 96 * 64
    assert (about["k"], about["grid"]) == (16, [8, 8])
    assert about["bytes"] == sum(path.stat().st_size for path in chain.tokens.glob("shards/*.zip"))
    assert about["usage"]["used"] == len(codes)
    assert about["usage"]["dead"] == 16 - len(codes)
    assert about["usage"]["entropy_bits"] == pytest.approx(entropy_of(tokens))
    assert about["usage"]["perplexity"] == pytest.approx(2 ** entropy_of(tokens))
    assert about["fingerprint"] == Codebook.load(chain.codebook).fingerprint
    expected = dict(zip(codes.tolist(), counts.tolist(), strict=True))
    assert all(expected[code] == count for code, count in about["most_used"] + about["least_used"])
    assert about["most_used"][0][1] == counts.max()
    assert about["least_used"][0][1] == counts.min()


def test_inspect_describes_a_codebook(chain):
    about, book = inspect(chain.codebook), Codebook.load(chain.codebook)
    assert about["kind"] == "codebook"
    assert about["fingerprint"] == book.fingerprint
    assert book.description.items() <= about.items()
    assert about["usage"]["used"] == (book.counts > 0).sum()
    assert about["usage"]["entropy_bits"] == pytest.approx(
        entropy_of(np.repeat(np.arange(len(book.counts)), book.counts))
    )


def test_inspect_shows_the_grid_of_a_key(chain):
    for shard, (_, rows) in zip(open_source(chain.images), TokenStore(chain.tokens).shards(), strict=True):
        record = shard.index()[5]
        image = inspect(chain.tokens, key=record.key)["image"]
        assert (image["key"], image["label"]) == (record.key, record.label)
        assert (image["height"], image["width"]) == (64, 64)
        (view,) = image["views"]
        assert view["tokens"] == rows.tokens[5, 0].tolist()
        assert view["crop"] == {"top": 0.0, "left": 0.0, "height": 64.0, "width": 64.0}
        assert view["flip"] is False


def test_inspect_prints_json_that_comes_back(chain, capsys: pytest.CaptureFixture[str]):
    key = open_source(chain.images)[0].index()[0].key
    for about in (inspect(chain.tokens, key=key), inspect(chain.codebook)):
        show(about, as_json=True)
        assert json.loads(capsys.readouterr().out) == about


def test_inspect_prints_a_table_with_the_same_figures(chain, capsys: pytest.CaptureFixture[str]):
    key = open_source(chain.images)[0].index()[0].key
    about = inspect(chain.tokens, key=key)
    show(about)
    out = capsys.readouterr().out
    assert about["fingerprint"] in out
    assert f"{about['usage']['perplexity']:.1f} of 16" in out
    assert key in out
    show(inspect(chain.codebook))
    assert "K=16, l2, seed 0" in capsys.readouterr().out


def test_inspect_of_an_unknown_key_or_a_foreign_folder_is_an_error(chain, tmp_path: Path):
    with pytest.raises(DataError, match="no image with key 'nobody'"):
        inspect(chain.tokens, key="nobody")
    with pytest.raises(UsageError, match=r"--key a: .* is a codebook"):
        inspect(chain.codebook, key="a")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="neither a codebook nor a token store"):
            inspect(path)


def test_inspect_of_an_unfinished_store_says_how_to_go_on(store: Path):
    (store / "manifest.json").unlink()
    with pytest.raises(DataError, match="encoding did not finish"):
        inspect(store)


# verify


def test_verify_passes_on_a_sound_store(chain, capsys: pytest.CaptureFixture[str]):
    assert verify(chain.tokens) == 96
    assert verify(chain.tokens, codebook=chain.codebook, images=str(chain.images)) == 96
    assert "source images" in capsys.readouterr().out


def expect_problem(store: Path, pattern: str, **options) -> None:
    with pytest.raises(DataError, match=pattern):
        verify(store, **options)


def flip_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_verify_finds_a_missing_shard(chain, store: Path):
    (store / f"shards/{chain.tars[1].stem}.zarr.zip").unlink()
    expect_problem(store, rf"{chain.tars[1].stem}\.zarr\.zip is missing")


@pytest.mark.parametrize("at", [0, 5000, -1])
def test_verify_finds_a_flipped_bit_in_a_shard(chain, store: Path, at: int):
    flip_bit(store / f"shards/{chain.tars[2].stem}.zarr.zip", at)
    expect_problem(store, rf"{chain.tars[2].stem}\.zarr\.zip was changed")


def test_verify_finds_a_flipped_bit_in_any_json(chain, store: Path):
    for path in store.rglob("*.json"):
        good = path.read_bytes()
        flip_bit(path, len(good) // 2)
        expect_problem(store, path.name)
        path.write_bytes(good)
    assert verify(store) == 96


def test_verify_finds_a_missing_or_resealed_entry(chain, store: Path):
    entry = store / f"shards/{chain.tars[0].stem}.json"
    content = json.loads(entry.read_text())
    content.pop("sha256_of_the_rest")
    write_sealed_json(entry, {**content, "images": 31})
    expect_problem(store, rf"{chain.tars[0].stem}\.json says other things than the manifest")
    entry.unlink()
    expect_problem(store, rf"{chain.tars[0].stem}\.json does not exist")


def test_verify_finds_a_resealed_embedded_codebook(store: Path):
    content = json.loads((store / "codebook.json").read_text())
    content.pop("sha256_of_the_rest")
    write_sealed_json(store / "codebook.json", {**content, "seed": 5})
    expect_problem(store, r"codebook\.json is not the one the manifest was written with")


def test_verify_finds_another_codebook(chain, store: Path, tower: str, tmp_path: Path):
    other = build_codebook(chain.images, tmp_path / "other", tower=tower, k=9, iterations=2, restarts=1)
    with pytest.raises(FingerprintMismatch, match=other.fingerprint[:12]):
        verify(store, codebook=tmp_path / "other")


def test_verify_finds_damaged_centroids(chain, store: Path, tmp_path: Path):
    book = Path(shutil.copytree(chain.codebook, tmp_path / "book"))
    flip_bit(book / "centroids.safetensors", -9)
    expect_problem(store, r"centroids\.safetensors was changed", codebook=book)


def test_verify_finds_a_changed_source_image_of_the_same_size(chain, store: Path, source: Path):
    tar = source / chain.tars[1].name
    record = open_source(source)[1].index()[3]
    flip_bit(tar, record.offset + record.length - 30)
    expect_problem(store, rf"{tar.name} .*is not the one that was encoded", images=str(source))
    assert verify(store) == 96


def test_verify_names_the_changed_image(chain, store: Path, source: Path, capsys: pytest.CaptureFixture[str]):
    record = open_source(source)[1].index()[3]
    flip_bit(source / chain.tars[1].name, record.offset + record.length - 30)
    expect_problem(store, "2 problem", images=str(source))
    assert f"image '{record.key}' has other bytes" in capsys.readouterr().err.replace("\n", " ")


def test_verify_finds_missing_and_additional_tars(chain, store: Path, source: Path):
    (source / chain.tars[2].name).rename(source / "other.tar")
    expect_problem(store, rf"{chain.tars[2].stem} has no source in --images", images=str(source))
    expect_problem(store, "2 problem", images=str(source))


def rewrite(store: Path, name: str, change) -> None:
    """Writes a shard with other rows, correctly sealed, as a faulty program would."""
    opened = TokenStore(store)
    entry = opened.entries[name]
    write_shard(store, name, change(opened.read_rows(name)), {field: entry[field] for field in SOURCE_FIELDS})
    write_manifest(store, opened.codebook, [read_entry(store, shard) for shard in opened.entries])


def with_token(value: int):
    def change(rows: ShardRows) -> ShardRows:
        tokens = rows.tokens.copy()
        tokens[4, 0, 2, 1] = value
        return replace(rows, tokens=tokens)

    return change


def with_key(value: str):
    def change(rows: ShardRows) -> ShardRows:
        keys = rows.keys.copy()
        keys[4] = value
        return replace(rows, keys=keys)

    return change


def test_verify_finds_tokens_beyond_the_codebook(chain, store: Path):
    rewrite(store, chain.tars[1].stem, with_token(15))
    assert verify(store) == 96
    rewrite(store, chain.tars[1].stem, with_token(16))
    expect_problem(store, rf"{chain.tars[1].stem} has token 16 and K is 16")


def test_verify_finds_a_key_twice_in_a_shard_and_across_shards(chain, store: Path):
    first, second = (TokenStore(store).read_rows(tar.stem).keys[0] for tar in chain.tars[:2])
    rewrite(store, chain.tars[1].stem, with_key(first))
    expect_problem(store, rf"{chain.tars[1].stem} holds 1 keys that another shard holds too, such as '{first}'")
    rewrite(store, chain.tars[1].stem, with_key(second))
    expect_problem(store, rf"{chain.tars[1].stem} does not hold 32 different keys")


def test_verify_finds_a_key_that_the_source_does_not_have(chain, store: Path):
    rewrite(store, chain.tars[1].stem, with_key("foreign"))
    expect_problem(store, "image 'foreign' is not in the source", images=str(chain.images))


def test_verify_of_what_is_no_store_is_an_error(chain, tmp_path: Path):
    expect_problem(tmp_path / "nowhere", "does not exist")
    expect_problem(chain.codebook, r"has no manifest\.json")


def test_verify_finds_a_shard_that_the_manifest_does_not_know(chain, store: Path):
    shard = store / "shards" / f"{chain.tars[0].stem}.zarr.zip"
    (store / "shards" / "foreign.zarr.zip").write_bytes(shard.read_bytes())
    expect_problem(store, r"foreign\.zarr\.zip is not in the manifest")
