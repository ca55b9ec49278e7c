"""Tokens are uint16 up to K = 65,536 and uint32 beyond, in memory and in both formats of a shard."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mapet.shared.artifacts.codes import MAX_K, MAX_K_OF_UINT16, token_dtype
from mapet.shared.errors import DataError
from mapet.shared.images.views import CENTER
from mapet.shared.sources.records import ImageRecord, crc32
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import empty_rows
from mapet.shared.tokens.shard_files import read_entry, read_shard, write_shard
from mapet.shared.tokens.store import SUFFIXES

ATTRIBUTES = {
    "codebook_fingerprint": "f",
    "view": CENTER.to_json(),
    "source": {"kind": "tar", "size": None, "sha256": ""},
}
PICTURE = b"a picture"


@pytest.mark.parametrize(
    ("k", "dtype"),
    [(1, "uint16"), (MAX_K_OF_UINT16, "uint16"), (MAX_K_OF_UINT16 + 1, "uint32"), (MAX_K, "uint32")],
)
def test_the_type_of_tokens_holds_all_of_them(k: int, dtype: str):
    assert token_dtype(k) == dtype
    assert np.iinfo(dtype).max >= k - 1


@pytest.mark.parametrize(("k", "dtype"), [(65_536, np.uint16), (65_537, np.uint32), (70_000, np.uint32)])
def test_a_codebook_assigns_the_last_of_its_codes(k: int, dtype: type):
    centroids = np.arange(k, dtype=np.float32)[:, None]
    tokens, _ = Codebook(centroids, np.zeros(k, dtype=np.int64), {}).assign(np.float32([[k - 0.9], [0.1]]))
    assert tokens.dtype == dtype
    assert tokens.tolist() == [k - 1, 0]


def write(folder: Path, tokens: np.ndarray, storage: str) -> dict:
    """Writes the tokens (n, 1, H, W) as a shard; returns its entry."""
    count, height, width = len(tokens), *tokens.shape[2:]
    (folder / "picture.jpg").write_bytes(PICTURE)
    rows = replace(
        empty_rows(1, (height, width)),
        keys=np.array([f"k{n}" for n in range(count)], dtype=object),
        tokens=tokens,
        crops=np.ones((count, 1, 4)),
        flips=np.zeros((count, 1), bool),
        sizes=np.ones((count, 2), np.int32),
        labels=np.full(count, -1),
        paths=np.array([""] * count, dtype=object),
        offsets=np.zeros(count, np.int64),
        lengths=np.full(count, len(PICTURE)),
        crc32=np.full(count, crc32(PICTURE), np.uint32),
    )
    records = [ImageRecord(key, folder / "picture.jpg", 0, len(PICTURE), None) for key in rows.keys]
    write_shard(folder, "shard", rows, ATTRIBUTES, records if storage == "webdataset" else None)
    return read_entry(folder, "shard")


TOKENS = st.sampled_from([np.uint16, np.uint32]).flatmap(
    lambda dtype: arrays(dtype, st.tuples(st.integers(1, 5), st.just(1), st.integers(1, 4), st.integers(1, 4)))
)


@settings(max_examples=30, deadline=None)
@given(tokens=TOKENS, storage=st.sampled_from(sorted(SUFFIXES)))
def test_any_tokens_are_read_back_from_a_shard(tmp_path_factory, tokens: np.ndarray, storage: str):
    folder = tmp_path_factory.mktemp("shard")
    entry = write(folder, tokens, storage)
    read = read_shard(folder, entry).tokens
    assert read.dtype == tokens.dtype
    assert np.array_equal(read, tokens)
    assert entry.get("dtype") == ("uint32" if tokens.dtype == np.uint32 else None)


@pytest.mark.parametrize("storage", sorted(SUFFIXES))
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_shard_of_another_type_than_its_entry_states_is_refused(tmp_path: Path, storage: str, dtype: str):
    entry = write(tmp_path, np.ones((2, 1, 3, 3), dtype), storage)
    entry = {**entry, "dtype": "uint32" if dtype == "uint16" else "uint16"}
    with pytest.raises(DataError, match=f"{dtype} .*, not {entry['dtype']}"):
        read_shard(tmp_path, entry)
