"""import: centroids and tokens from elsewhere become what build-codebook and encode-shards write."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.errors import DataError, UsageError
from mapet.shared.sources.records import read_bytes
from mapet.shared.sources.sources import open_source, read_records
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import COLUMNS
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.import_tokens import import_codebook, import_tokens, which_import
from mapet.tokenize_stage.inspect import inspect, show
from mapet.tokenize_stage.verify import verify


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def write_csv(path: Path, lines: list[list[str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    return path


# Centroids


def test_imported_centroids_are_the_codebook_that_they_came_from(chain, tower: str, tmp_path: Path, capsys):
    book = Codebook.load(chain.codebook)
    file = save(tmp_path / "c.npy", book.centroids.astype(np.float64))
    imported = import_codebook(tmp_path / "book", centroids=file, tower=tower)
    assert imported.fingerprint == book.fingerprint
    assert np.array_equal(Codebook.load(tmp_path / "book").centroids, book.centroids)
    assert verify(tmp_path / "book") == 16
    before = files_of(tmp_path / "book")
    import_codebook(tmp_path / "book", centroids=file, tower=tower)  # again: nothing to do
    assert files_of(tmp_path / "book") == before
    about = inspect(tmp_path / "book")
    capsys.readouterr()
    show(about)
    shown = capsys.readouterr().out
    assert about["imported"]["sha256"] in shown
    assert "codes used" not in shown
    assert (about["usage"], about["k"], about["metric"]) == (None, 16, "l2")
    show(about, as_json=True)
    assert json.loads(capsys.readouterr().out) == about
    with pytest.raises(UsageError, match="other settings"):
        build_codebook(chain.images, tmp_path / "book", tower=tower, k=16, iterations=1, restarts=1)


def test_an_imported_codebook_encodes_the_same_tokens(chain, tower: str, tmp_path: Path):
    file = save(tmp_path / "c.npy", Codebook.load(chain.codebook).centroids)
    import_codebook(tmp_path / "book", centroids=file, tower=tower)
    encode_shards(chain.images, tmp_path / "book", tmp_path / "out", batch_size=16)
    shards = "shards/{}.zarr.zip"
    expected = files_of(chain.tokens)
    found = files_of(tmp_path / "out")
    assert all(found[shards.format(tar.stem)] == expected[shards.format(tar.stem)] for tar in chain.tars)
    show(inspect(tmp_path / "out"))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((16, 31), np.float32), "have 31 dimensions, and --tower .* gives features of 32"),
        (np.zeros(32, np.float32), r"holds float32 of shape \(32,\); it must be floats \(K, dim\)"),
        (np.zeros((16, 32), np.int64), "holds int64"),
        (np.zeros((1, 32), np.float32), "holds 1 centroids; there must be 2 to 2147483648"),
        (np.zeros((65_537, 1), np.float16), "have 1 dimensions, and --tower"),
        (np.diag([1.0] * 20 + [np.nan] * 12), "not finite, first in row 20"),
        (np.full((2, 32), 1e300), "not finite, first in row 0"),
        (np.array([["a"] * 32] * 16, dtype=object), "cannot be read as a .npy array"),
    ],
)
def test_centroids_that_cannot_be_are_refused(tower: str, tmp_path: Path, array: np.ndarray, words: str):
    with pytest.raises(DataError, match=words) as caught:
        import_codebook(tmp_path / "book", centroids=save(tmp_path / "c.npy", array), tower=tower)
    assert "c.npy" in str(caught.value)
    assert not (tmp_path / "book").exists()


def test_centroids_of_cosine_have_length_one(chain, tower: str, tmp_path: Path):
    centroids = Codebook.load(chain.codebook).centroids
    options = {"tower": tower, "metric": "cosine"}
    with pytest.raises(DataError, match=r"row 0 has length .*, and --metric cosine"):
        import_codebook(tmp_path / "book", centroids=save(tmp_path / "c.npy", centroids), **options)
    centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    book = import_codebook(tmp_path / "book", centroids=save(tmp_path / "c.npy", centroids), **options)
    assert book.description["metric"] == "cosine"
    with pytest.raises(UsageError, match="--metric dot is unknown"):
        import_codebook(tmp_path / "new", centroids=tmp_path / "c.npy", tower=tower, metric="dot")


def test_what_is_no_npy_file_is_refused(tower: str, tmp_path: Path):
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "empty.npy").touch()
    np.savez(tmp_path / "many.npz", a=np.zeros(3))
    for name in ("text.npy", "empty.npy", "many.npz", "nowhere.npy"):
        with pytest.raises(DataError, match=f"--centroids .*{name}"):
            import_codebook(tmp_path / "book", centroids=tmp_path / name, tower=tower)


def test_import_takes_one_or_the_other():
    none = dict.fromkeys(("centroids", "tokens", "csv", "images", "codebook"))
    with pytest.raises(UsageError, match="missing: --tokens, --csv, --images, --codebook"):
        which_import(**none)
    with pytest.raises(UsageError, match=r"missing: --csv, --images\."):
        which_import(**none | {"tokens": "t.npy", "codebook": "book"})
    with pytest.raises(UsageError, match="takes --centroids"):
        which_import(**none | {"centroids": "c.npy", "images": "images"})
    assert which_import(**none | {"centroids": "c.npy"}) == "codebook"
    assert which_import(centroids=None, tokens="t.npy", csv="l.csv", images="images", codebook="book") == "tokens"


# Tokens


@pytest.fixture
def published(chain, tmp_path: Path) -> dict[str, np.ndarray | list[str]]:
    """The chain's tokens as one array in an order of its own, and the keys in that order."""
    rows = [rows for _, rows in TokenStore(chain.tokens).shards()]
    order = np.random.default_rng(0).permutation(96)
    return {
        "tokens": np.concatenate([part.tokens[:, 0] for part in rows])[order],
        "keys": np.concatenate([part.keys for part in rows])[order].tolist(),
    }


@pytest.fixture
def take(chain, tmp_path: Path, published) -> Callable[..., TokenStore]:
    """take(tokens=..., lines=..., images=...): imports them to tmp_path/store; as published, if not given."""

    def take(**given) -> TokenStore:
        lines = given.get("lines", [[key] for key in published["keys"]])
        return import_tokens(
            tmp_path / "store",
            tokens=save(tmp_path / "t.npy", given.get("tokens", published["tokens"])),
            csv=write_csv(tmp_path / "list.csv", lines),
            images=given.get("images", str(chain.images)),
            codebook=chain.codebook,
        )

    return take


def expect_equal(found: TokenStore, expected: TokenStore) -> None:
    assert found.entries.keys() == expected.entries.keys()
    for name, rows in expected.shards():
        mine = found.read_rows(name)
        for column in COLUMNS:
            ours, theirs = getattr(mine, column), getattr(rows, column)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), (name, column)
        assert mine.classes == rows.classes
        for field in ("source", "view", "codebook_fingerprint", "skipped", "images"):
            assert found.entries[name][field] == expected.entries[name][field]


def test_imported_tokens_are_rows_as_encode_shards_writes_them(chain, take, tmp_path: Path):
    store = take()
    expect_equal(store, TokenStore(chain.tokens))
    assert store.entries[chain.tars[0].stem]["imported"]["tokens_sha256"]
    assert verify(store.path, codebook=chain.codebook, images=str(chain.images), reencode=20) == 96
    show(inspect(store.path))
    with pytest.raises(UsageError, match="already holds a token store"):
        take()


@pytest.mark.parametrize(
    "form",
    [
        lambda tokens: tokens.reshape(96, 64),
        lambda tokens: tokens.astype(np.int64),
        lambda tokens: tokens.astype(">i4"),
        lambda tokens: np.asfortranarray(tokens),
        lambda tokens: tokens.astype(np.uint8).reshape(96, 64),
    ],
)
def test_tokens_may_come_in_any_integers_flat_or_not(chain, take, published, form):
    expect_equal(take(tokens=form(published["tokens"])), TokenStore(chain.tokens))


@pytest.mark.parametrize(
    "form",
    [
        lambda keys: [["path"], *([f"{key}.jpg"] for key in keys)],
        lambda keys: [["label", "Filename"], *(["7", f"{key}.jpg"] for key in keys)],
        lambda keys: [["what", "else"], *([key, "-"] for key in keys)],
        lambda keys: [[f"./{key}.JPEG", "x, y"] for key in keys],
        lambda keys: [line for key in keys for line in ([key], [])],
    ],
)
def test_images_may_be_named_in_many_ways(chain, take, published, form):
    expect_equal(take(lines=form(published["keys"])), TokenStore(chain.tokens))


def test_images_of_a_folder_are_named_by_key_or_path(chain, take, published, tmp_path: Path, monkeypatch):
    folder = tmp_path / "folder"
    for record in read_records(chain.images):
        path = folder / f"class{record.label:02d}/{record.key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_bytes(record))
    expected = encode_shards(folder, chain.codebook, tmp_path / "expected", batch_size=16)
    path_of = {path.stem: path for path in folder.rglob("*.jpg")}
    monkeypatch.chdir(tmp_path)
    for name in (
        lambda path: str(path),
        lambda path: str(path.relative_to(folder)),
        lambda path: str(path.relative_to(folder).with_suffix("")),
        lambda path: str(path.relative_to(tmp_path)),
    ):
        store = take(lines=[[name(path_of[key])] for key in published["keys"]], images=str(folder))
        expect_equal(store, expected)
        shutil.rmtree(store.path)


def test_odd_sizes_and_rotation_are_read_from_headers(chain, tmp_path: Path, write_tar):
    import io

    from PIL import Image

    members, exif = {}, Image.Exif()
    for number, size in enumerate([(90, 70), (33, 200), (1, 1), (64, 65)]):
        exif[0x0112] = 6 if number % 2 else 1
        buffer = io.BytesIO()
        Image.new("RGB", size, (9, 99, 40 * number)).save(buffer, "JPEG", exif=exif)
        members[f"{number}.jpg"] = buffer.getvalue()
    tar = write_tar(tmp_path / "x.tar", members)
    expected = encode_shards(tar, chain.codebook, tmp_path / "expected")
    ((_, rows),) = expected.shards()
    store = import_tokens(
        tmp_path / "store",
        tokens=save(tmp_path / "t.npy", rows.tokens[:, 0]),
        csv=write_csv(tmp_path / "list.csv", [[key] for key in rows.keys]),
        images=tar,
        codebook=chain.codebook,
    )
    expect_equal(store, expected)
    assert rows.sizes[1].tolist() == [33, 200]


def changed(keys: list[str], at: int, name: str) -> list[list[str]]:
    return [[name if number == at else key] for number, key in enumerate(keys)]


def test_missing_doubled_and_foreign_rows_are_named(take, published, tmp_path: Path):
    keys, tokens = published["keys"], published["tokens"]
    with pytest.raises(DataError, match=r"list\.csv names 1 image\(s\) \('nobody/x.jpg'\) that are not in --images"):
        take(lines=changed(keys, 5, "nobody/x.jpg"))
    with pytest.raises(DataError, match=rf"list\.csv names image '{keys[3]}' in lines 4 and 6"):
        take(lines=changed(keys, 5, f"{keys[3]}.jpg"))
    with pytest.raises(
        DataError, match=r"--images holds 2 image\(s\) \('.*', '.*'\) that are not in --csv .*list\.csv"
    ):
        take(lines=[[key] for key in keys[:-2]], tokens=tokens[:-2])
    with pytest.raises(DataError, match=r"names 94 images, and --tokens .* has 96 rows"):
        take(lines=[[key] for key in keys[:-2]])
    with pytest.raises(DataError, match="has no column 2 in line 4"):
        take(lines=[["label", "path"], *(["7", key][: 1 if at == 2 else 2] for at, key in enumerate(keys))])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tokens: tokens.astype(np.float32), r"holds float32 of shape \(96, 8, 8\); the codebook's grid needs"),
        (lambda tokens: tokens.reshape(96, 4, 16), r"holds uint16 of shape \(96, 4, 16\)"),
        (lambda tokens: tokens[:, :7], "grid needs integers"),
        (lambda tokens: np.where(np.arange(96)[:, None, None] == 41, 16, tokens), "first in row 41"),
        (lambda tokens: np.where(np.arange(96)[:, None, None] == 0, -1, tokens.astype(int)), "first in row 0"),
    ],
)
def test_tokens_that_cannot_be_are_refused(take, published, tmp_path: Path, change, words: str):
    with pytest.raises(DataError, match=words):
        take(tokens=change(published["tokens"]))
    assert not (tmp_path / "store").exists()


def test_what_is_no_csv_is_refused(chain, published, tmp_path: Path):
    tokens = save(tmp_path / "t.npy", published["tokens"])
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("bytes.csv", "nowhere.csv"):
        with pytest.raises(DataError, match=f"--csv .*{name}"):
            import_tokens(
                tmp_path / "store",
                tokens=tokens,
                csv=tmp_path / name,
                images=str(chain.images),
                codebook=chain.codebook,
            )


def test_an_interrupted_import_goes_on(chain, take, tmp_path: Path):
    whole = files_of(take().path)
    for name in ("manifest.json", f"shards/{chain.tars[1].stem}.json"):
        (tmp_path / "store" / name).unlink()
    kept = tmp_path / f"store/shards/{chain.tars[0].stem}.zarr.zip"
    before = kept.stat().st_mtime_ns
    take()
    assert files_of(tmp_path / "store") == whole
    assert kept.stat().st_mtime_ns == before


def test_remote_tars_are_refused(chain, take):
    with pytest.raises(UsageError, match="is remote"):
        take(images="http://127.0.0.1:9/x.tar")


def test_images_that_are_no_images_stop_an_import(take, source: Path, tmp_path: Path):
    record = open_source(source)[1].index()[3]
    data = bytearray(record.path.read_bytes())
    data[record.offset : record.offset + 50] = bytes(50)
    record.path.write_bytes(data)
    with pytest.raises(DataError, match=f"image '{record.key}' is not an image of a format that is read"):
        take(images=str(source))
    assert not (tmp_path / "store/manifest.json").exists()
