"""Checks of sources with unusable images, which are errors, or listed if they are to be skipped."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from mapet.shared.errors import DataError
from mapet.shared.sources.sources import open_source, read_records


def _index_and_skipped(source: Path) -> tuple[list[str], list[tuple[str, str]]]:
    skipped: list[tuple[str, str]] = []
    return [record.key for shard in open_source(source) for record in shard.index(skipped)], skipped


@pytest.fixture(scope="session")
def index_and_skipped() -> Callable[[Path], tuple[list[str], list[tuple[str, str]]]]:
    """index_and_skipped(source): the keys of all usable images, and (key, reason) of the others."""
    return _index_and_skipped


def _expect_unusable(source: Path, usable: list[str], key: str, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        read_records(source)
    assert str(caught.value).startswith(str(source))
    assert "\n" not in str(caught.value)
    keys, ((skipped, reason),) = _index_and_skipped(source)
    assert (keys, skipped) == (usable, key)
    assert words in reason
    assert str(source.parent) not in reason


@pytest.fixture(scope="session")
def expect_unusable() -> Callable[[Path, list[str], str, str], None]:
    """expect_unusable(source, usable, key, words): one image of a source is unusable.

    Reading it raises an error that names the source and contains `words`; with a list of skipped images it gives the
    keys `usable`, and the list has (key, `words`).
    """
    return _expect_unusable


@pytest.fixture(scope="session")
def list_source() -> str:
    """A script that prints [images, skipped, digests, error] of the source that is its argument, as JSON."""
    return _LIST_SOURCE


_LIST_SOURCE = """
import json, sys
from mapet.shared.errors import DataError
from mapet.shared.sources.sources import open_source, read_records
skipped = []
images = [(record.key, record.label) for shard in open_source(sys.argv[1]) for record in shard.index(skipped)]
digests = [shard.sha256(skip=True) for shard in open_source(sys.argv[1])]
try:
    read_records(sys.argv[1])
except DataError as error:
    print(json.dumps([images, skipped, digests, str(error)]))
"""
