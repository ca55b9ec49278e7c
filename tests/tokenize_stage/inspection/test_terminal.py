"""What inspect prints: colours on a terminal, numbers where there is none, and nothing that markup could change."""

import io
import json
import re
from pathlib import Path

import pytest
from mapet.tokenize_stage.inspect import inspect, show
from mapet.tokenize_stage.inspection import terminal as show_module
from rich.console import Console


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch):
    """printed(about, **console): what `show` prints on such a console."""

    def run(about: dict, **console) -> str:
        file = io.StringIO()
        monkeypatch.setattr(show_module, "results", Console(file=file, width=120, **console))
        show(about)
        return file.getvalue()

    return run


def test_the_map_is_blocks_of_colour_on_a_terminal(chain, printed):
    about = inspect(chain.tokens)
    out = printed(about, force_terminal=True, color_system="truecolor", no_color=False)
    blocks = re.findall(r"\x1b\[48;2;(\d+);(\d+);(\d+)m  ", out)
    assert len(set(blocks)) > 8
    assert ("68", "1", "84") in blocks  # the darkest place
    assert ("253", "231", "37") in blocks  # the lightest one


def test_the_map_is_numbers_in_a_pipe_and_digits_where_rows_are_long(chain, printed):
    about = inspect(chain.tokens)
    lines = printed(about, force_terminal=False).splitlines()
    rows = [line.split() for line in lines if re.fullmatch(r"[\d ]+", line)]
    assert rows == [[f"{value:.0f}" for value in row] for row in about["positions"]["perplexity"]]
    wide = {**about, "positions": {"perplexity": [[1.0, *[5.0] * 30, 10.0]] * 2}}
    rows = [line for line in printed(wide, force_terminal=False).splitlines() if re.fullmatch(r"\d{32}", line)]
    assert rows == ["0" + "4" * 30 + "9"] * 2


def test_the_table_has_the_figures_of_the_json(views_store: Path, capsys: pytest.CaptureFixture[str]):
    about = inspect(views_store)
    show(about, as_json=True)
    assert json.loads(capsys.readouterr().out) == about
    show(about)
    said = capsys.readouterr().out
    for agreement in (
        about["same_place"],
        about["neighbours"]["horizontal"],
        about["neighbours"]["vertical"],
        about["overlaps"]["all"],
        about["overlaps"]["other_flip"],
    ):
        assert f"{agreement['share']:.2%} share a code (chance {agreement['chance']:.2%})" in said
    assert f"normalised mutual information {about['labels']['nmi']:.4f}" in said
    assert f"50% of patches: {about['coverage'][0]['codes']}," in said


def test_quality_has_its_value_beside_chance(chain, capsys: pytest.CaptureFixture[str]):
    about = inspect(chain.tokens, images=str(chain.images), codebook=chain.codebook, quality_images=6)
    show(about)
    said = capsys.readouterr().out
    assert "Quality, over 96 images, 6 of them encoded again" in said
    rows = {cells[1].strip(): cells[2:5] for cells in (line.split("│") for line in said.splitlines()) if len(cells) > 5}
    quality, pictures = about["quality"], about["quality"]["pictures"]
    purity, flips = quality["labels"]["purity"], pictures["flips"]
    shares = [f"{purity['value']:.2%}", f"{purity['chance']:.2%}", f"{purity['adjusted']:.4f}"]
    assert [cell.strip() for cell in rows["purity"]] == shares
    shares = [f"{flips['share']:.2%}", f"{flips['chance']:.2%}", f"{flips['adjusted']:.4f}"]
    assert [cell.strip() for cell in rows["stable if mirrored"]] == shares
    gain = quality["bigrams"]["horizontal"]
    assert f"{gain['gain_bits']:.3f} of {gain['unigram_bits']:.3f} bits" in rows["left tells"][0]
    assert rows["reconstruction error"][0].strip() == f"{pictures['reconstruction']['error']:.1%}"


def test_a_codebook_shows_distances_and_how_the_objective_fell(chain, capsys: pytest.CaptureFixture[str]):
    about = inspect(chain.codebook)
    show(about)
    said = capsys.readouterr().out
    assert f"min {about['distances']['nearest']['min']:.4g}" in said
    first, *_, last = about["objective"][0]
    assert f"restart 0: {first:.4g} -> {last:.4g} in 5 iterations" in said


def test_what_looks_like_markup_is_printed_as_it_is(chain, printed):
    about = inspect(chain.tokens, key=inspect_key(chain))
    about["image"]["key"] = "[red]key[/red]"
    about["codebook"]["tower"] = "[bold]tower[/bold]"
    out = printed(about, force_terminal=False)
    assert "[red]key[/red]: label" in out


def inspect_key(chain) -> str:
    from mapet.shared.tokens.store import TokenStore

    return next(iter(TokenStore(chain.tokens)))
