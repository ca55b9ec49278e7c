"""What docs/ shows is true: its examples are run, on the small chain."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_the_examples_of_a_page_run_as_they_are_shown(chain, page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(chain.tokens.parent)
    result = doctest.testfile(str(DOCS / page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
