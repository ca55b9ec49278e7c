"""Sizes of memory: how they are read, how they are written, and the default."""

import pytest
from mapet.shared.errors import UsageError
from mapet.shared.runtime.memory import as_text, free_bytes, memory_budget


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GB", 10**9),
        ("8GiB", 8 << 30),
        ("1.5 GB", 1_500_000_000),
        ("800MB", 800_000_000),
        ("64Mi", 64 << 20),
        ("3kB", 3000),
        ("3KiB", 3072),
        ("2T", 2 * 10**12),
        ("5000", 5000),
    ],
)
def test_valid_sizes(text: str, size: int):
    assert memory_budget(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1 GB free", "-1GB", "1XB", "1,5GB", "0GB", "1iB", "half", "1gb"])
def test_an_invalid_size_is_a_usage_error(text: str):
    with pytest.raises(UsageError, match="is not a valid size; give one such as"):
        memory_budget(text)


def test_the_default_is_most_of_the_free_memory():
    assert 0.5 * free_bytes() < memory_budget(None) < 0.9 * free_bytes()


@pytest.mark.parametrize(("size", "text"), [(999, "999 B"), (1500, "1.5 kB"), (10**9, "1 GB"), (2 * 10**12, "2 TB")])
def test_sizes_as_text(size: int, text: str):
    assert as_text(size) == text
