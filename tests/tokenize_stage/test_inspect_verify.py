"""inspect counts what is there; verify finds whatever was changed after it was written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.errors import DataError, FingerprintMismatch, MapetError, UsageError
from mapet.shared.sources.sources import open_source
from mapet.shared.storage.files import sha256_file, write_sealed_json
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import ShardRows, take_rows
from mapet.shared.tokens.store import TokenStore, read_entry, write_manifest, write_shard
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.inspect import inspect, show
from mapet.tokenize_stage.verify import verify
from safetensors.numpy import save_file

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
    expect_problem(store, rf"{chain.tars[0].stem}\.json differs from its entry in the manifest")
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


def rewrite(store: Path, name: str, change, **attributes) -> None:
    """Writes a shard with other rows, correctly sealed, as a faulty program would."""
    opened = TokenStore(store)
    entry = opened.entries[name]
    write_shard(
        store, name, change(opened.read_rows(name)), {field: entry[field] for field in SOURCE_FIELDS} | attributes
    )
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
    expect_problem(store, rf"{chain.tars[1].stem} has token 16, and K is 16")


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
    expect_problem(tmp_path, r"has no manifest\.json")


def test_verify_finds_a_shard_that_the_manifest_does_not_know(chain, store: Path):
    shard = store / "shards" / f"{chain.tars[0].stem}.zarr.zip"
    (store / "shards" / "foreign.zarr.zip").write_bytes(shard.read_bytes())
    expect_problem(store, r"foreign\.zarr\.zip is not in the manifest")


def test_verify_names_images_that_are_neither_stored_nor_listed(chain, store: Path):
    opened = TokenStore(store)
    name = chain.tars[1].stem
    key = opened.read_rows(name).keys[4]
    rewrite(store, name, lambda rows: take_rows(rows, [*range(4), *range(5, 32)]))
    expect_problem(store, f"image '{key}' is neither in the store nor listed as skipped", images=str(chain.images))
    rewrite(store, name, lambda rows: rows, skipped=[[key, "a reason"]])
    assert verify(store, images=str(chain.images)) == 95


# verify --reencode


def test_images_encoded_again_have_their_tokens(chain, store: Path, capsys: pytest.CaptureFixture[str]):
    options = {"codebook": chain.codebook, "images": str(chain.images)}
    assert verify(store, **options, reencode=7) == 96
    assert "7 images: 448 tokens compared, 0 differ" in capsys.readouterr().out
    verify(store, **options, reencode=1000, batch_size=16)
    assert "96 images: 6,144 tokens compared, 0 differ" in capsys.readouterr().out


def test_all_views_are_encoded_again(chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "views"
    encode_shards(chain.tars[0], chain.codebook, out, crop="random-resized", views=3, with_center=True, seed=5)
    options = {"codebook": chain.codebook, "images": str(chain.tars[0]), "reencode": 9}
    assert verify(out, **options) == 32
    assert "9 images: 1,728 tokens compared, 0 differ" in capsys.readouterr().out


def test_a_wrong_token_crop_or_flip_is_found_and_its_image_named(chain, store: Path, capsys):
    name, options = chain.tars[1].stem, {"codebook": chain.codebook, "images": str(chain.images), "reencode": 96}
    rows = TokenStore(store).read_rows(name)
    key, token = rows.keys[4], int(rows.tokens[4, 0, 2, 1])
    rewrite(store, name, with_token((token + 8) % 16))
    verify(store)
    expect_problem(store, f"{name}: image '{key}' has 1 of 64 other tokens when it is encoded again", **options)
    rewrite(store, name, lambda _: replace(rows, crops=rows.crops + 1))
    expect_problem(store, f"{name}: image '.*' has other crops when it is encoded again", **options)
    rewrite(store, name, lambda _: replace(rows, flips=~rows.flips))
    expect_problem(store, "32 problem.*has other flips when it is encoded again", **options)


def test_which_images_are_encoded_again_is_drawn_by_the_seed(chain, store: Path):
    """With every second token grid of a shard wrong, one image is wrong or right as the seed draws it."""

    def finds(seed: int) -> bool:
        try:
            verify(store, codebook=chain.codebook, images=str(chain.images), reencode=1, seed=seed)
        except DataError:
            return True
        return False

    for tar in chain.tars:
        rewrite(store, tar.stem, lambda rows: replace(rows, flips=np.arange(len(rows))[:, None] % 2 == 1))
    found = [finds(seed) for seed in range(8)]
    assert found == [finds(seed) for seed in range(8)]
    assert set(found) == {True, False}


def test_tokens_between_equally_near_centroids_count_as_rounding(chain, tmp_path: Path, capsys):
    """Two equal centroids: whichever of them a stored token names, it is right."""
    book = Codebook.load(chain.codebook)
    centroids = np.concatenate([book.centroids, book.centroids[:1]])
    counts = np.append(book.counts, 0)
    twin = replace(book, centroids=centroids, counts=counts, description={**book.description, "k": 17})
    twin.save(tmp_path / "twin")
    encode_shards(chain.tars[0], tmp_path / "twin", tmp_path / "out")
    name = chain.tars[0].stem
    options = {"codebook": tmp_path / "twin", "images": str(chain.tars[0]), "reencode": 32}
    verify(tmp_path / "out", **options)
    rewrite(tmp_path / "out", name, with_one_changed(0, 16))
    verify(tmp_path / "out", **options)
    assert "1 differ, 1 of them between codes that match equally well" in capsys.readouterr().out
    rewrite(tmp_path / "out", name, lambda rows: replace(rows, tokens=np.where(rows.tokens == 0, 16, rows.tokens)))
    expect_problem(tmp_path / "out", "too many tokens differ", **options)


def with_one_changed(old: int, new: int):
    def change(rows: ShardRows) -> ShardRows:
        tokens = rows.tokens.copy()
        tokens.reshape(-1)[np.flatnonzero(tokens == old)[0]] = new
        return replace(rows, tokens=tokens)

    return change


def test_encoding_again_needs_images_codebook_and_the_same_tower(chain, store: Path, resnet_tower: str):
    with pytest.raises(UsageError, match="--reencode 5 needs the images"):
        verify(store, codebook=chain.codebook, reencode=5)
    with pytest.raises(UsageError, match="--reencode 5 needs the centroids"):
        verify(store, images=str(chain.images), reencode=5)
    with pytest.raises(UsageError, match="must be a number of images"):
        verify(store, reencode=-1)
    with pytest.raises(FingerprintMismatch, match="is not the tower of the codebook"):
        verify(store, codebook=chain.codebook, images=str(chain.images), reencode=5, tower=resnet_tower)


# Codebooks, and whatever byte is changed


def test_verify_of_a_codebook(chain, capsys: pytest.CaptureFixture[str]):
    assert verify(chain.codebook) == 16
    assert Codebook.load(chain.codebook).fingerprint in capsys.readouterr().out
    with pytest.raises(UsageError, match="is a codebook"):
        verify(chain.codebook, images=str(chain.images))


@pytest.mark.parametrize(
    "change",
    [
        {"centroids": np.zeros((15, 32), np.float32)},
        {"counts": np.zeros(15, np.int64)},
    ],
)
def test_verify_finds_a_codebook_that_cannot_be(chain, tmp_path: Path, change: dict):
    replace(Codebook.load(chain.codebook), **change).save(tmp_path / "book")
    expect_problem(tmp_path / "book", r"centroids\.safetensors holds centroids")


def test_centroids_that_are_not_finite_are_neither_saved_nor_opened(chain, tmp_path: Path):
    book, folder = Codebook.load(chain.codebook), tmp_path / "book"
    centroids = book.centroids.copy()
    centroids[3, 5] = np.nan
    wrong = replace(book, centroids=centroids)
    with pytest.raises(DataError, match=r"book would hold centroids that are not finite \(1 of 16, the first is 3\)"):
        wrong.save(folder)
    assert not folder.exists()
    folder.mkdir()
    save_file({"centroids": centroids, "counts": book.counts}, folder / "centroids.safetensors")
    write_sealed_json(folder / "codebook.json", wrong.as_json(sha256_file(folder / "centroids.safetensors")))
    with pytest.raises(DataError, match="book holds centroids that are not finite"):
        verify(folder)


def flips(chain, folder: Path, count: int, seed: int, k: int = 16) -> list[str]:
    """Flips single bytes of store, codebook and source tars, one after the other; those that verify did not find."""
    store, codebook = (Path(shutil.copytree(path, folder / path.name)) for path in (chain.tokens, chain.codebook))
    (codebook / "timings.json").unlink(missing_ok=True)  # says how long things took; nothing rests on it
    files = sorted(path for root in (store, codebook) for path in root.rglob("*") if path.is_file())
    random, missed = np.random.default_rng(seed), []
    for number in range(count):
        path = files[number % len(files)]
        good = path.read_bytes()
        at, value = int(random.integers(len(good))), int(random.integers(1, 256))
        path.write_bytes(good[:at] + bytes([good[at] ^ value]) + good[at + 1 :])
        try:
            verify(store if path.is_relative_to(store) else codebook)
            missed.append(f"byte {at} of {path.name}, xor {value}")
        except MapetError as error:
            assert str(path.parent.parent if path.parent.name == "shards" else path.parent) in str(error)  # noqa: PT017
        path.write_bytes(good)
    assert (verify(store, codebook=codebook), verify(codebook)) == (96, k)
    return missed


def test_every_flipped_byte_is_found(chain, tmp_path: Path):
    assert flips(chain, tmp_path, 44, seed=3) == []
