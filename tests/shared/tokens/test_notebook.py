"""Stores and codebooks in notebooks: by key, as numpy, torch and pandas, and as tables with escaped text."""

import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from mapet.shared.errors import DataError, UsageError
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.notebook import columns
from mapet.shared.tokens.store import TokenStore, read_entry, write_manifest, write_shard

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def store(chain) -> TokenStore:
    return TokenStore(chain.tokens)


class _Cells(HTMLParser):
    """The text of the cells of all tables, and the names of all elements."""

    def __init__(self, html: str):
        super().__init__()
        self.cells: list[str] = []
        self.inside = False
        self.elements: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        if tag == "td":
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "td"

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.cells[-1] += data


def test_a_key_gives_the_tokens_of_its_image(store: TokenStore):
    for _, rows in store.shards():
        for at in (0, 31):
            image = store[rows.keys[at]]
            assert (image.key, image.label) == (rows.keys[at], rows.labels[at])
            assert (image.height, image.width) == tuple(rows.sizes[at])
            for name in ("tokens", "crops", "flips"):
                assert np.array_equal(getattr(image, name), getattr(rows, name)[at])
    with pytest.raises(DataError, match="no image with key 'nobody'"):
        store["nobody"]


def test_iteration_gives_the_keys_in_the_order_of_the_rows(store: TokenStore):
    keys = [key for _, rows in store.shards() for key in rows.keys]
    assert list(store) == keys
    assert [image.key for image in store.tokens()] == keys
    assert keys[40] in store
    assert "nobody" not in store


def test_several_keys_give_their_images_in_that_order(store: TokenStore):
    keys = list(store)
    requested = [keys[70], keys[3], keys[70], keys[40]]
    assert [image.key for image in store.tokens(requested)] == requested
    everything = store.to_numpy()
    assert (everything.shape, everything.dtype) == ((96, 1, 8, 8), np.uint16)
    assert np.array_equal(store.to_numpy(requested), everything[[70, 3, 70, 40]])
    assert store.to_numpy([]).shape == (0, 1, 8, 8)
    assert np.array_equal(store.to_numpy(keys[3]), everything[[3]])  # one key, not a list of letters
    with pytest.raises(DataError, match="no image with key 'nobody'"):
        store.to_numpy([keys[0], "nobody"])


def test_torch_gets_int64(store: TokenStore):
    keys = list(store)[:3]
    tokens = store.to_torch(keys)
    assert tokens.dtype == torch.int64
    assert np.array_equal(tokens.numpy(), store.to_numpy(keys))
    assert torch.equal(store[keys[1]].to_torch(), tokens[1])


def test_the_columns_for_pandas_have_a_row_per_patch(views_rows: TokenStore):
    keys = list(views_rows)[:3]
    table, everything = columns(list(views_rows.tokens(keys))), views_rows.to_numpy(keys)
    assert list(table) == ["key", "label", "view", "flip", "row", "column", "token"]
    assert {len(column) for column in table.values()} == {3 * 2 * 64}
    for line in (0, 63, 64, 130, 383):
        key, label, view, flip, row, column, token = (table[name][line] for name in table)
        image = views_rows[key]
        assert label == image.label
        assert flip == image.flips[view]
        assert token == image.tokens[view, row, column] == everything[keys.index(key), view, row, column]
    assert all(len(column) == 0 for column in columns([]).values())


@pytest.fixture
def views_rows(chain, tmp_path: Path) -> TokenStore:
    """A copy of the store with two views of each image, the second one mirrored."""
    return changed(
        chain.tokens,
        tmp_path,
        lambda rows: replace(
            rows,
            tokens=np.concatenate([rows.tokens, rows.tokens[..., ::-1]], axis=1),
            crops=rows.crops.repeat(2, axis=1),
            flips=np.tile([False, True], (len(rows), 1)),
        ),
        views=2,
    )


def changed(store: Path, tmp_path: Path, change, **view) -> TokenStore:
    out = Path(shutil.copytree(store, tmp_path / "changed"))
    opened = TokenStore(out)
    for name, entry in opened.entries.items():
        attributes = {field: entry[field] for field in ("codebook_fingerprint", "source")}
        rows = change(opened.read_rows(name))
        write_shard(out, name, rows, {**attributes, "view": entry["view"] | view})
    write_manifest(out, opened.codebook, [read_entry(out, name) for name in opened.entries])
    return TokenStore(out)


def test_pandas_gets_a_data_frame(store: TokenStore):
    pandas = pytest.importorskip("pandas")
    frame = store.to_pandas(list(store)[:2])
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 2 * 64
    assert frame.token.tolist() == store.to_numpy(list(store)[:2]).reshape(-1).tolist()


def test_without_pandas_the_error_says_what_to_install(store: TokenStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        store.to_pandas()


def test_a_store_and_an_image_are_shown_as_tables(store: TokenStore, views_rows: TokenStore):
    cells = _Cells(store._repr_html_()).cells
    assert cells[0] == "96"
    assert store.fingerprint in cells
    assert "8x8, K = 16" in cells
    image = views_rows[next(iter(views_rows))]
    assert list(map(int, _Cells(image._repr_html_()).cells)) == image.tokens.reshape(-1).tolist()
    assert "view 1: 64.0x64.0 at (0.0, 0.0), flipped" in _Cells(image._repr_html_()).text


def test_a_codebook_is_shown_as_a_table_and_as_a_line(chain):
    book = Codebook.load(chain.codebook)
    cells = _Cells(book._repr_html_()).cells
    assert cells[0] == "16 centroids of 32 dimensions, l2"
    assert any(cell.endswith("of 16") for cell in cells)
    assert repr(book) == f"Codebook({book.fingerprint[:12]}: K=16, 32 dimensions)"


def test_text_in_tables_is_escaped(chain, tmp_path: Path):
    store = changed(chain.tokens, tmp_path, lambda rows: replace(rows, keys=rows.keys + EVIL))
    image = store[next(iter(store))]
    for thing, text in (
        (image, image.key),
        (replace(Codebook.load(chain.codebook), description={"tower": EVIL, "grid": [8, 8]} | FIELDS), EVIL),
    ):
        page = _Cells(thing._repr_html_())
        assert "script" not in page.elements
        assert text in page.text
    store.codebook["tower"] = EVIL
    page = _Cells(store._repr_html_())
    assert "script" not in page.elements
    assert EVIL in page.text


FIELDS = dict.fromkeys(
    ("library", "architecture", "weights_sha256", "layer", "final_norm", "precision", "preprocess", "metric"), "x"
)
