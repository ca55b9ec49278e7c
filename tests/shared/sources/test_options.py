"""Options of sources: what a store records of them, and what is taken from it again."""

from typing import Any

import pytest
from mapet.shared.errors import UsageError
from mapet.shared.sources.keys import extension_of, is_hidden, key_of
from mapet.shared.sources.options import DEFAULT, SourceOptions


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("a.jpg", "a", "a"),
        ("x.y/a.b.jpg", "x.y/a", "x.y/a.b"),
        ("x.y/readme", "x.y/readme", "x.y/readme"),
        ("./a.b.c", "./a", "./a.b"),
    ],
)
def test_a_key_ends_at_the_first_or_the_last_dot(name: str, first: str, last: str):
    assert (key_of(name), key_of(name, "last-dot")) == (first, last)


def test_an_extension_is_that_of_the_base_name():
    names = ["a.JPG", "x.jpg/readme", "image", "a.b.c"]
    assert [extension_of(name) for name in names] == ["jpg", "", "", "c"]


def test_hidden_and_system_names():
    hidden = [".x", "a/.b/c.jpg", "__MACOSX/a.jpg", "x/@eaDir/a.jpg", "Thumbs.db", "PaxHeaders.1/a", "PaxHeader/a"]
    assert [name for name in hidden if not is_hidden(name)] == []
    visible = ["./a.jpg", "a/../b.jpg", "a.b/c..jpg", "PaxHeadersOfMine/a.jpg", "macosx/a.jpg", "lost/found.jpg"]
    assert [name for name in visible if is_hidden(name)] == []


def source(kind: str, **options: Any) -> dict[str, Any]:
    return {"kind": kind, "size": 1, "sha256": "", **({"options": options} if options else {})}


@pytest.mark.parametrize("kind", ["tar", "folder"])
@pytest.mark.parametrize(
    "options",
    [
        DEFAULT,
        SourceOptions(key_until="last-dot"),
        SourceOptions(key_until="first-dot"),
        SourceOptions(key_prefix="tar", image_field="jpg,png", max_pixels=9, label_from="tar"),
    ],
)
def test_a_store_reads_its_sources_as_they_were_encoded(kind: str, options: SourceOptions):
    recorded = options.to_json(kind)
    again = SourceOptions.of_store([source(kind, **recorded)])
    assert again.until(kind) == options.until(kind)
    assert (again.prefixes, again.image_fields) == (options.prefixes, options.image_fields)
    assert (again.max_pixels, again.label_from, again.is_old) == (options.max_pixels, options.label_from, False)
    assert again.to_json(kind) == recorded


def test_a_tar_with_default_options_records_nothing():
    assert DEFAULT.to_json("tar") == {}


def test_a_folder_of_an_earlier_version_ends_keys_at_the_first_dot():
    options = SourceOptions.of_store([source("folder")])
    assert (options.is_old, options.until("folder"), options.to_json("folder")) == (True, "first-dot", {})
    assert "jfif" not in options.extensions


def test_a_store_of_tars_and_a_folder_keeps_the_rule_of_each():
    options = SourceOptions.of_store([source("tar"), source("folder", **DEFAULT.to_json("folder"))])
    assert (options.until("tar"), options.until("folder")) == ("first-dot", "last-dot")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (SourceOptions(key_until="last-dot"), "with --key-until first-dot and now --key-until last-dot"),
        (SourceOptions(key_prefix="tar"), "with --key-prefix none and now --key-prefix tar"),
        (SourceOptions(image_field="png"), "without --image-field and now --image-field png"),
    ],
)
def test_options_that_change_keys_cannot_differ_from_the_stores(given: SourceOptions, words: str):
    with pytest.raises(UsageError, match=words):
        SourceOptions.of_store([source("tar")]).given(given, "tokens")


def test_other_options_may_differ_from_the_stores():
    stored = SourceOptions.of_store([source("tar", max_pixels=5)])
    assert stored.given(DEFAULT, "tokens").max_pixels == 5
    assert stored.given(SourceOptions(max_pixels=9), "tokens").max_pixels == 9


@pytest.mark.parametrize(
    "options", [{"key_until": "dot"}, {"key_prefix": "x"}, {"label_from": "x"}, {"max_pixels": 0}, {"image_field": ","}]
)
def test_an_unknown_value_is_a_usage_error(options: dict):
    with pytest.raises(UsageError, match=f"--{next(iter(options)).replace('_', '-')}"):
        SourceOptions(**options)
