"""Batches from workers arrive, or what prevents them is said."""

import tempfile
from pathlib import Path

import pytest
from mapet.shared.errors import DataError, UsageError
from mapet.shared.runtime.loader import OneByOne, batches


def load(index: int) -> dict[str, int]:
    if index == 3:
        raise DataError("image 3 is damaged.")
    return {"index": index}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_an_error_comes_as_itself(workers: int):
    loaded = batches(OneByOne(load), [[0, 1], [2], [4, 3], [5]], workers)
    assert next(loaded)["index"].tolist() == [0, 1]
    assert next(loaded)["index"].tolist() == [2]
    with pytest.raises(DataError, match=r"^image 3 is damaged\.$"):
        next(loaded)


@pytest.mark.parametrize(("length", "works"), [(71, True), (72, False)])
def test_a_temporary_folder_that_workers_cannot_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, length: int, works: bool
):
    with tempfile.TemporaryDirectory(prefix="t") as root:
        folder = Path(root, "x" * (length - len(root) - 1))
        folder.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        assert next(batches(OneByOne(load), [[0]], 0))["index"].tolist() == [0]
        if works:
            assert next(batches(OneByOne(load), [[0]], 1))["index"].tolist() == [0]
        else:
            with pytest.raises(UsageError, match="set TMPDIR to a shorter one"):
                next(batches(OneByOne(load), [[0]], 1))
