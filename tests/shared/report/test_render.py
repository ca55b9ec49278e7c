"""Rendering: one HTML file in which all text is escaped and which loads nothing."""

import json
import re
from pathlib import Path

import mapet.shared.report.render
import numpy as np
import pytest
from jinja2 import UndefinedError
from mapet.shared.errors import DataError
from mapet.shared.printable import printable
from mapet.shared.report.pictures import data_uri, golden_colours, hex_colours
from mapet.shared.report.render import render, write_page
from PIL import Image

REPORT = Path(mapet.shared.report.render.__file__).parent
HOSTILE = "</script><script>alert('x')</script>\u2028<!-- & -->\x1b[2J\u202e\udcff"
ORIGIN = ("tower", "library", "pretrained", "weights_sha256", "layer", "dim", "precision", "metric")
MADE_BY = {**dict.fromkeys(ORIGIN, HOSTILE), "preprocess": {"image_size": 64, "resize": HOSTILE}}
ABOUT = {
    "kind": "codebook",
    "path": HOSTILE,
    "fingerprint": "f" * 64,
    "k": 2,
    "grid": [1, 2],
    "usage": None,
    "distances": None,
    "against": {"path": HOSTILE},
    "quality": {"images": 2, "pictures": None},
    "warnings": [{"sign": "s", "what": HOSTILE, "why": HOSTILE, "do": HOSTILE}],
}
VALUES = {
    "title": HOSTILE,
    "data": {"counts": [0, 0], "perplexity": None, "objective": None, "text": HOSTILE},
    "about": ABOUT,
    "made_by": MADE_BY,
    "name": HOSTILE,
    "images": [],
    "codes": [],
    "nearest": None,
    "against": [(HOSTILE, HOSTILE)],
    "quality": [dict.fromkeys(("name", "means", "value", "chance", "adjusted"), HOSTILE)],
    "compared": [(HOSTILE, HOSTILE, HOSTILE)],
    "most_bits": 1.0,
}


def test_all_text_is_escaped():
    page = render("store", **VALUES)
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") > 10
    # The scripts and the data; no other text begins or ends a script.
    assert len(re.findall(r"<script\b", page)) == len(re.findall(r"</script", page)) == 5
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data[1])["text"] == printable(HOSTILE)
    assert not set("<>&\u2028") & set(data[1])
    assert not set("\u2028\x1b\u202e\udcff") & set(page)


def test_the_page_loads_nothing_and_forbids_loading():
    page = render("store", **VALUES)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src &#39;none&#39;;")
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert "&#39;unsafe-inline&#39;" not in policy.split("style-src")[0]
    places = re.findall(r"(?:src|href)=(\S{0,7})", page.split("<script")[0])
    assert places
    assert all(place.startswith(('"data:', '"#')) for place in places)


def test_missing_values_and_nan_are_errors():
    with pytest.raises(UndefinedError):
        render("store", **{**VALUES, "about": {}})
    with pytest.raises(ValueError, match="JSON compliant"):
        render("store", **{**VALUES, "data": {**VALUES["data"], "more": float("nan")}})


def test_a_page_that_cannot_be_written_is_a_data_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="could not be written"):
        write_page(tmp_path / "file" / "page.html", "store", **VALUES)


def test_no_script_contains_its_end_tag():
    scripts = sorted(REPORT.rglob("*.js"))
    assert len(scripts) >= 4
    for script in scripts:
        assert "</script" not in script.read_text(encoding="utf-8").lower(), script
        assert "<!--" not in script.read_text(encoding="utf-8"), script


def test_colours_differ_and_are_written_in_order():
    colours = golden_colours(512)
    assert (colours.shape, colours.dtype) == ((512, 3), np.uint8)
    assert len({tuple(colour) for colour in colours.tolist()}) > 500
    assert np.abs(np.diff(colours.astype(int), axis=0)).sum(1).min() > 100
    assert hex_colours(np.array([[0, 255, 16], [1, 2, 3]])) == "00ff10010203"


def test_a_data_uri_contains_the_image():
    import base64
    import io

    image = Image.linear_gradient("L").convert("RGB")
    kind, content = data_uri(image).split(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as again:
        assert np.abs(np.asarray(again, dtype=int) - np.asarray(image)).mean() < 3
