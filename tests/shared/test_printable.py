"""Text of strangers becomes text that is safe to print, and JSON that reads back as the very same value."""

import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapet.shared.errors import DataError
from mapet.shared.printable import printable, printable_json, printable_values

ANY_TEXT = st.text(st.characters(codec=None))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("n01440764/a photo.é.jpg", "n01440764/a photo.é.jpg"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x9b31m\x7f\0", "\\x9b31m\\x7f\\x00"),
        ("a\u202egpj.exe", "a\\u202egpj.exe"),
        ("\u2028\u2029\ufeff\u00ad", "\\u2028\\u2029\\ufeff\\xad"),
        ("\udcff.jpg", "\\udcff.jpg"),
        ("\U000e0041", "\\U000e0041"),
        ("می\u200cخواهم 👩\u200d🔬 日本", "می\u200cخواهم 👩\u200d🔬 日本"),
    ],
)
def test_what_is_hidden_becomes_an_escape(text: str, shown: str):
    assert printable(text) == shown


def test_every_string_among_json_values_becomes_printable():
    assert printable_values({"a\x1b": ["b\nc\x07", 1, None, 0.5]}) == {"a\\x1b": ["b\\nc\\x07", 1, None, 0.5]}


def test_no_hidden_character_is_forgotten():
    shown = printable("".join(map(chr, range(sys.maxunicode + 1))))
    categories = {unicodedata.category(character) for character in shown if character not in "\u200c\u200d"}
    assert not categories & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(ANY_TEXT)
def test_printable_text_is_utf_8_and_stays_as_it_is(text: str):
    shown = printable(text)
    assert shown.encode("utf-8").decode("utf-8") == shown == printable(shown)


@given(st.dictionaries(ANY_TEXT, st.lists(ANY_TEXT)))
def test_json_is_printable_and_reads_back_as_the_same_value(value: dict):
    text = printable_json(value, indent=1)
    assert all(line == printable(line) for line in text.split("\n"))
    assert json.loads(text) == value


def test_errors_are_one_printable_sentence():
    assert str(DataError("bad\n\x1b[2J.jpg is no image")) == "bad\\n\\x1b[2J.jpg is no image"
