"""inspect --html: the page of a store and of a codebook, opened in a real browser."""

import io
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mapet.shared.errors import DataError, FingerprintMismatch, UsageError
from mapet.shared.images.views import ViewPolicy
from mapet.shared.printable import printable
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.store import TokenStore
from mapet.shared.tokens.stored_views import StoredViews, choose_images
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.import_tokens import import_codebook, import_tokenizer
from mapet.tokenize_stage.inspect import inspect
from mapet.tokenize_stage.inspection.quality_figures import quality_figures
from mapet.tokenize_stage.pages.gallery import choose_codes, sample_patches
from mapet.tokenize_stage.pages.page import StorePage
from mapet.tokenize_stage.quality.pictures import StorePictures
from mapet.tokenize_stage.tokenizers.nearest_code import open_same_tower
from mapet.tokenize_stage.tokenizers.opening import load_tokenizer
from mapet.tokenize_stage.towers.features import extract
from PIL import Image

COLUMNS = 8
HOSTILE = "<script>document.title='broken'</script>"


@dataclass(frozen=True)
class Written:
    path: Path
    about: dict[str, Any]


@pytest.fixture(scope="module")
def written(chain, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The page of the chain's store, with its images and its codebook."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    about = inspect(chain.tokens, html=path, images=str(chain.images), codebook=chain.codebook)
    return Written(path, about)


def tokens_of(store: TokenStore, key: str, view: int = 0) -> np.ndarray:
    rows, at = store.find(key)
    return rows.tokens[at, view]


def shown_keys(page) -> list[str]:
    return page.locator(".image h3").all_text_contents()


def settle(page) -> None:
    """Waits until what just happened is painted."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")


def lit(page) -> list[int]:
    """How many patches of each image are lit."""
    settle(page)
    return [int(number) for number in page.eval_on_selector_all(".image", "all => all.map(one => one.dataset.lit)")]


def fellows(store: TokenStore, page, code: int) -> list[int]:
    return [int((tokens_of(store, key) == code).sum()) for key in shown_keys(page)]


def veiled(page, image: int) -> list[bool]:
    """Of each patch of an image, whether its middle is darkened."""
    script = """([image, columns]) => {
        const canvas = document.querySelectorAll(".image canvas")[2 * image], { width, height } = canvas;
        const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data, cell = width / columns;
        const middle = (at) => (Math.floor(at / columns) + 0.5) * cell * width + (at % columns + 0.5) * cell;
        return d3.range(columns * columns).map((at) => pixels[4 * middle(at) + 3] > 0);
    }"""
    return page.evaluate(script, [image, COLUMNS])


def point_at(page, image: int, area: str, at: int) -> None:
    place = page.locator(".image").nth(image).locator(area)
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    row, column = divmod(at, COLUMNS)
    page.mouse.move(box["x"] + (column + 0.5) * box["width"] / 8, box["y"] + (row + 0.5) * box["height"] / 8)


@pytest.mark.parametrize("area", [".photo", ".map"])
def test_pointing_at_a_patch_lights_up_every_patch_of_its_code(chain, written: Written, open_page, area: str):
    store, page = TokenStore(chain.tokens), open_page(written.path).page
    tokens = tokens_of(store, shown_keys(page)[3]).reshape(-1)
    point_at(page, 3, area, 21)
    assert lit(page) == fellows(store, page, tokens[21])
    assert veiled(page, 3) == (tokens != tokens[21]).tolist()
    assert page.locator(".code.lit").all_text_contents()[0].split()[:2] == ["Code", str(tokens[21])]
    assert f"Code {tokens[21]} " in page.inner_text("#lamp")
    assert f"{written.about['counts'][tokens[21]]:,} patches" in page.inner_text("#lamp")
    page.mouse.move(2, 2)
    assert set(lit(page)) == {0}
    assert page.locator("#lamp").is_hidden()


def test_the_arrow_keys_walk_through_the_patches(chain, written: Written, open_page):
    store, page = TokenStore(chain.tokens), open_page(written.path).page
    tokens = tokens_of(store, shown_keys(page)[0])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus(".image h3 a")
    page.keyboard.press("Shift+Tab")
    row = column = 0
    steps = {"ArrowRight": (0, 1), "ArrowDown": (1, 0), "End": (0, 7), "ArrowUp": (-1, 0), "Home": (0, -7)}
    for key, (down, right) in steps.items():
        page.keyboard.press(key)
        row, column = np.clip(row + down, 0, 7), np.clip(column + right, 0, 7)
        code = tokens[row, column]
        assert f"row {row + 1}, column {column + 1}, code {code}" in page.evaluate("document.activeElement.ariaLabel")
        assert lit(page) == fellows(store, page, code)
    said = page.locator("#live", has_text=f"Code {tokens[0, 0]}, row 1, column 1")
    said.wait_for(state="attached")
    assert "on this page" in said.inner_text()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == f"#code={tokens[0, 0]}"
    page.keyboard.press("Tab")
    assert lit(page) == fellows(store, page, tokens[0, 0])
    page.keyboard.press("Escape")
    assert set(lit(page)) == {0}


def test_links_restore_what_they_name_and_back_goes_back(chain, written: Written, open_page):
    store = TokenStore(chain.tokens)
    page = open_page(written.path, "#code=5&tokens=over").page
    assert lit(page) == fellows(store, page, 5)
    assert page.get_attribute("#overlay", "aria-pressed") == "true"
    key = shown_keys(page)[-1]
    page.goto(f"file://{written.path}#key={key}")
    assert set(lit(page)) == {0}
    assert page.inner_text(".image.current h3") == key
    assert page.locator(".image.current").bounding_box()["y"] < 900
    page.go_back()
    assert lit(page) == fellows(store, page, 5)
    page.go_forward()
    assert page.inner_text(".image.current h3") == key
    # What nobody knows is said, not guessed.
    page.goto(f"file://{written.path}#key=nobody&code=16")
    assert "“nobody” is not on this page" in page.inner_text("#found")
    assert set(lit(page)) == {0}


def test_a_click_keeps_the_light_and_the_address(chain, written: Written, open_page):
    store, page = TokenStore(chain.tokens), open_page(written.path).page
    code = int(tokens_of(store, shown_keys(page)[1])[2, 3])
    point_at(page, 1, ".map", 19)
    page.mouse.down()
    page.mouse.up()
    page.mouse.move(2, 2)
    assert page.evaluate("location.hash") == f"#code={code}"
    assert lit(page) == fellows(store, page, code)
    page.click("#next")
    page.click("#clear")
    assert set(lit(page)) == {0}
    page.go_back()
    assert lit(page) == fellows(store, page, code)


def test_search_finds_codes_and_keys(chain, written: Written, open_page):
    store, page = TokenStore(chain.tokens), open_page(written.path).page
    keys = shown_keys(page)

    def search(text: str) -> None:
        page.fill("#query", text)
        page.keyboard.press("Enter")
        settle(page)

    search("7")
    assert page.evaluate("location.hash") == "#code=7"
    assert lit(page) == fellows(store, page, 7)
    search(keys[10])
    assert page.inner_text(".image.current h3") == keys[10]
    search("00003")  # with leading zeros it is no code
    visible = [key for key in keys if "00003" in key]
    assert 1 < len(visible) < len(keys)
    assert page.locator(".image:not([hidden]) h3").all_text_contents() == visible
    assert f"{len(visible)} of {len(keys)} images" in page.inner_text("#found")
    search("no such thing")
    assert "No image on this page" in page.inner_text("#found")
    search("")
    assert page.locator(".image:not([hidden])").count() == len(keys)


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits(written: Written, open_page, width: int, scheme: str):
    opened = open_page(written.path, "#code=5", width=width, scheme=scheme)
    opened.page.wait_for_selector("#perplexity-map svg")
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 200) == (scheme == "dark")
    assert opened.faults() == []


def test_the_figures_on_the_page_are_those_of_json(written: Written, open_page):
    page, about = open_page(written.path).page, written.about
    shown = page.eval_on_selector_all("[data-figure]", "all => all.map(one => [one.dataset.figure, one.dataset.value])")
    assert len(shown) >= 11
    for name, value in shown:
        steps = [int(step) if step.isdigit() else step for step in name.split(".")]
        assert float(value) == reduce(lambda found, step: found[step], steps, about), name
    for name in ("most_used", "least_used"):
        rows = page.locator(f"[data-table={name}] tbody tr")
        cells = [row.split("\t")[:2] for row in rows.all_inner_texts()]
        assert [[int(cell.replace(",", "")) for cell in row] for row in cells] == about[name]
    assert page.evaluate("page.data.counts") == about["counts"]
    assert page.evaluate("page.data.perplexity") == about["positions"]["perplexity"]
    assert page.locator("#perplexity-map rect").count() >= 64
    assert (
        page.locator("[data-figure='usage.perplexity']").inner_text().startswith(f"{about['usage']['perplexity']:.0f}")
    )


def shown_patches(page) -> dict[int, list[tuple[str, int, int, str]]]:
    """Of each code: (key, row, column, distance) of the patches in the gallery."""
    found = {}
    script = """all => all.map((card) => [card.dataset.code, [...card.querySelectorAll("img")].map((one) => one.alt),
        [...card.querySelectorAll("figcaption")].map((one) => one.textContent)])"""
    for code, alts, distances in page.eval_on_selector_all(".code", script):
        distances = distances or [""] * len(alts)
        places = [re.fullmatch(r"Patch in row (\d+), column (\d+) of (.*)", alt).groups() for alt in alts]
        found[int(code)] = [
            (key, int(row) - 1, int(column) - 1, distance)
            for (row, column, key), distance in zip(places, distances, strict=True)
        ]
    return found


def test_the_patches_of_a_code_are_those_nearest_its_centroid(chain, written: Written, open_page):
    store, book = TokenStore(chain.tokens), Codebook.load(chain.codebook)
    nearest: dict[int, list[float]] = {code: [] for code in range(book.k)}
    records = [
        r for tar in store.shards() for r in [StoredViews(store, str(chain.images)).record(*tar, n) for n in range(32)]
    ]
    tower = open_same_tower(book, None, "cpu")
    for batch in extract(tower, records, ViewPolicy.from_json(store.view), 32, 0, unit_length=False):
        for features in batch.values[:, 0].astype(np.float64):
            apart = np.linalg.norm(features[:, None] - book.centroids, axis=-1)
            for code in set(apart.argmin(1)):
                nearest[int(code)].append(apart[apart.argmin(1) == code, code].min())
    patches = shown_patches(open_page(written.path).page)
    assert sorted(patches) == [code for code in range(book.k) if nearest[code]]
    for code, found in patches.items():
        assert all(tokens_of(store, key)[row, column] == code for key, row, column, _ in found)
        wanted = sorted(nearest[code])[:6]
        assert [float(distance) for *_, distance in found] == pytest.approx(wanted, rel=6e-3)


def test_patches_of_a_code_without_a_distance_are_those_of_the_largest_logit(
    chain, dvae_files: dict[str, Path], open_page, tmp_path: Path
):
    """DALL-E's dVAE takes the largest inner product plus bias; its patches showed a distance of 0."""
    book, tokens = tmp_path / "book", tmp_path / "tokens"
    import_tokenizer(book, dvae=dvae_files["zip"], image_size=16)
    encode_shards(chain.tars[0], book, tokens)
    inspect(tokens, html=tmp_path / "report.html", images=str(chain.images), codebook=book, quality_images=0)
    tokenizer, store = load_tokenizer(book), TokenStore(tokens)
    views, largest = StoredViews(store, str(chain.images)), {code: [] for code in range(tokenizer.k)}
    ((name, rows),) = store.shards()
    records = [views.record(name, rows, row) for row in range(len(rows))]
    for batch in extract(tokenizer, records, ViewPolicy.from_json(store.view), 32, 0, unit_length=False):
        for features in batch.values[:, 0].astype(np.float64):
            logits = features @ tokenizer.codebook.centroids.T + tokenizer.codebook.bias
            for code in set(logits.argmax(1)):
                largest[int(code)].append(logits[logits.argmax(1) == code, code].max())
    page = open_page(tmp_path / "report.html").page
    assert "This tokenizer has no distance" in page.locator("#codes + .about").inner_text()
    patches = shown_patches(page)
    assert patches
    for code, found in patches.items():
        wanted = sorted(largest[code], reverse=True)[:6]
        assert [float(logit) for *_, logit in found] == pytest.approx(wanted, rel=6e-3, abs=6e-3)


def test_quality_is_on_the_page_with_a_line_on_each_figure(written: Written, open_page):
    page = open_page(written.path).page
    rows = page.locator("[data-table=quality] tbody tr")
    shown = [[cell.strip() for cell in row.locator("th, td").all_inner_texts()] for row in rows.all()]
    wanted = quality_figures(written.about["quality"])
    assert [[f"{one.name}\n{one.means}", one.value, one.chance, one.adjusted] for one in wanted] == shown
    assert len(shown) == 9
    assert "96 images, of which 96 were encoded again" in page.locator("#quality + .about").inner_text()


def test_without_a_codebook_patches_are_a_seeded_sample_of_all(chain, open_page, tmp_path: Path):
    found = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        inspect(chain.tokens, html=tmp_path / f"{name}.html", images=str(chain.images), seed=seed)
    for name in ("one", "other"):
        page = open_page(tmp_path / f"{name}.html").page
        found.append(shown_patches(page))
    patches, others = found
    assert patches != others
    assert len(shown_keys(page)) == 96
    store = TokenStore(chain.tokens)
    for code, places in patches.items():
        assert len({key for key, *_ in places}) == len(places)
        assert all(tokens_of(store, key)[row, column] == code for key, row, column, _ in places)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "again.html").read_bytes()
    assert "drawn at random" in page.locator("#codes + .about").inner_text()


def test_a_sample_of_patches_is_uniform_over_all_of_them(chain):
    store = TokenStore(chain.tokens)
    holding = [np.nonzero(rows.tokens == 3) for _, rows in store.shards()]
    everywhere = [(shard, image) for shard, found in enumerate(holding) for image in found[0].tolist()]
    random, drawn, expected = np.random.default_rng(0), Counter(), Counter()
    for seed in range(30):
        patches = sample_patches(store, list(store.entries), [3], seed, lambda steps: None)[3]
        assert len({(patch.place.shard, patch.place.row) for patch in patches}) == len(patches) == 16
        drawn.update(list(store.entries).index(patch.place.shard) for patch in patches)
        order = [everywhere[at] for at in random.permutation(len(everywhere))]
        expected.update(shard for shard, _ in list(dict.fromkeys(order))[:16])
    assert len(expected) == 3
    for shard, count in expected.items():
        assert drawn[shard] == pytest.approx(count, abs=60)


def test_codes_are_taken_from_the_top_the_bottom_and_between():
    counts = np.array([0, *range(100, 0, -1), 0])
    codes = choose_codes(counts, 20)
    assert codes[:5] == [1, 2, 3, 4, 5]
    assert codes[-5:] == [96, 97, 98, 99, 100]
    assert len(set(codes)) == 20
    assert codes == sorted(codes)
    assert choose_codes(counts, 500) == list(range(1, 101))


def test_images_are_drawn_without_replacement_from_the_shards_that_are_at_hand(chain):
    store = TokenStore(chain.tokens)
    first, _, last = store.entries
    places = choose_images(store, [first, last], 40, 0)
    assert {place.shard for place in places} == {first, last}
    assert len(set(places)) == 40
    assert len(choose_images(store, [last], 40, 0)) == 32


@pytest.fixture(scope="module")
def hostile(chain, write_folder, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A store of several views, with keys that would break a page that does not escape; it holds its own images."""
    root, random = tmp_path_factory.mktemp("hostile"), np.random.default_rng(0)
    names = [f"{HOSTILE}.png", "a b+c&d=e#f%20.png", "\u2028'\"<img src=x onerror=alert(1)>.png", "plain.png"]
    files = {}
    for name in names:
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (80, 60, 3), dtype=np.uint8)).save(file, format="PNG")
        files[name] = file.getvalue()
    write_folder(root / "images", files)
    policy = {"crop": "random-resized", "views": 3, "format": "webdataset"}
    encode_shards(root / "images", chain.codebook, root / "tokens", **policy)
    about = inspect(root / "tokens", html=root / "report.html", key=HOSTILE)
    return Written(root / "report.html", about)


def test_hostile_keys_show_as_text_and_can_be_linked_to(hostile: Written, open_page):
    page = open_page(hostile.path).page
    assert page.title() == "tokens: token store"
    keys = shown_keys(page)
    assert keys[0] == HOSTILE
    assert len(keys) == 4
    for link in page.locator(".image h3 a").all():
        link.click()
        settle(page)
        assert page.inner_text(".image.current h3 a") == link.inner_text()
        page.reload()
        assert page.inner_text(".image.current h3 a") == link.inner_text()
    page.fill("#query", HOSTILE)
    page.keyboard.press("Enter")
    settle(page)
    assert page.inner_text(".image.current h3") == HOSTILE
    assert page.title() == "tokens: token store"


def test_a_store_that_holds_its_images_shows_each_in_the_view_whose_tokens_it_shows(hostile: Written, open_page):
    page = open_page(hostile.path).page
    store = TokenStore(hostile.path.parent / "tokens")
    said = page.locator(".image p").all_text_contents()
    stored = {printable(key): key for key in store}
    assert stored.keys() != set(stored.values())  # one key has a character that is shown as an escape
    for image, (key, words) in enumerate(zip(shown_keys(page), said, strict=True)):
        view, mirrored = re.fullmatch(r"view (\d) of 3(, mirrored)?", words.strip()).groups()
        rows, at = store.find(stored[key])
        assert rows.flips[at, int(view) - 1] == bool(mirrored)
        tokens = page.evaluate(f"page.data.images[{image}].tokens")
        assert tokens == rows.tokens[at, int(view) - 1].reshape(-1).tolist()


def test_a_store_without_images_says_how_to_see_them(chain, tmp_path: Path, open_page):
    inspect(chain.tokens, html=tmp_path / "report.html")
    page = open_page(tmp_path / "report.html").page
    assert page.locator("img").count() == 0
    assert "--images IMAGES" in page.locator("#images + .about").inner_text()
    page.wait_for_selector("#usage-curve svg")
    page.goto(f"file://{tmp_path / 'report.html'}#code=3")
    page.wait_for_selector("#lamp >> text=none on this page")


def test_warnings_are_on_the_page_as_text(chain, tmp_path: Path, open_page):
    store = TokenStore(chain.tokens)
    about = inspect(chain.tokens)
    warning = {"sign": "collapsed", "what": f"Wrong {HOSTILE}", "why": "Because.", "do": "Do this."}
    StorePage(tmp_path / "report.html", StorePictures(store)).write({**about, "warnings": [warning]})
    page = open_page(tmp_path / "report.html").page
    assert page.locator(".warnings article").inner_text().split("\n\n") == [f"Wrong {HOSTILE}", "Because.", "Do this."]


def test_what_changed_from_another_store_is_on_the_page(chain, tmp_path: Path, open_page):
    about = inspect(chain.tokens, against=chain.tokens, html=tmp_path / "report.html")
    said = open_page(tmp_path / "report.html").page.inner_text("#against + dl")
    assert f"{about['against']['keys']['common']} common, 0 only here, 0 only there" in said
    assert "100.00%" in said
    page = open_page(tmp_path / "report.html").page
    rows = [row.split("\t") for row in page.locator("[data-table=compared] tbody tr").all_inner_texts()]
    assert {row[0] for row in rows} >= {"codes", "perplexity", "purity", "left tells"}
    assert all(here == there for _, here, there in rows)


def test_a_codebook_has_a_page_too(chain, tmp_path: Path, open_page):
    about = inspect(chain.codebook, html=tmp_path / "report.html")
    opened = open_page(tmp_path / "report.html")
    assert opened.page.locator("h1").inner_text() == "codebook"
    opened.page.wait_for_selector("#objective svg")
    assert opened.page.evaluate("page.data.counts") == about["counts"]
    median = opened.page.get_attribute("[data-figure='distances.nearest.median']", "data-value")
    assert float(median) == about["distances"]["nearest"]["median"]
    pairs = opened.page.locator("[data-table=closest] tbody tr").all_inner_texts()
    assert [[int(code) for code in pair.split()[:2]] for pair in pairs] == [
        pair[:2] for pair in about["distances"]["closest"]
    ]
    assert opened.faults() == []
    opened.page.evaluate("document.querySelector('label').remove(); document.querySelector('#query').placeholder = ''")
    assert any("query" in fault for fault in opened.faults())  # the audit finds what there is


def test_an_imported_codebook_says_that_its_usage_is_not_known(tower: str, tmp_path: Path, open_page):
    np.save(tmp_path / "centroids.npy", np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32))
    import_codebook(tmp_path / "book", centroids=tmp_path / "centroids.npy", tower=tower)
    inspect(tmp_path / "book", html=tmp_path / "report.html")
    page = open_page(tmp_path / "report.html", "#code=4").page
    page.wait_for_selector("#lamp >> text=It is not known how often it is used")
    assert page.locator("#usage-curve, #objective").count() == 0


def test_figures_alone_do_not_wait_for_the_tower_library():
    code = "import sys, mapet.tokenize_stage.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_does_not_fit_is_told_before_anything_is_written(chain, tower: str, source: Path, tmp_path: Path):
    html = tmp_path / "report.html"
    with pytest.raises(UsageError, match="--images belongs to a page or to --codebook; give --html"):
        inspect(chain.tokens, images=str(chain.images))
    with pytest.raises(UsageError, match=r"--html .* is a folder; give a file"):
        inspect(chain.tokens, html=tmp_path)
    with pytest.raises(UsageError, match="belongs to a token store"):
        inspect(chain.codebook, html=html, images=str(chain.images))
    foreign = source.rename(tmp_path / "foreign")
    for number, tar in enumerate(sorted(foreign.glob("*.tar"))):
        tar.rename(foreign / f"foreign-{number}.tar")
    with pytest.raises(DataError, match="has none of the shards"):
        inspect(chain.tokens, html=html, images=str(foreign))
    build_codebook(chain.images, tmp_path / "other", tower=tower, k=9, iterations=1, restarts=1)
    with pytest.raises(FingerprintMismatch, match="was made with codebook"):
        inspect(chain.tokens, html=html, images=str(chain.images), codebook=tmp_path / "other")
    assert not html.exists()


def test_an_image_that_is_not_the_one_that_was_encoded_is_named(chain, source: Path, tmp_path: Path):
    store = TokenStore(chain.tokens)
    name, rows = next(store.shards())
    tar = source / f"{name}.tar"
    content = bytearray(tar.read_bytes())
    content[int(rows.offsets[5]) + 200] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=f"image '{rows.keys[5]}' is not the one that was encoded"):
        inspect(chain.tokens, html=tmp_path / "report.html", images=str(tar))
    assert not (tmp_path / "report.html").exists()
