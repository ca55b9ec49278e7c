"""What inspect counts in a store is what plain loops over the plain Zarr files count."""

import io
import json
import math
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import zarr
from mapet.shared.errors import DataError
from mapet.shared.tokens.codebook import Codebook
from mapet.shared.tokens.rows import ShardRows
from mapet.tokenize_stage.build_codebook import build_codebook
from mapet.tokenize_stage.counting import store as counting
from mapet.tokenize_stage.counting.count_table import CountTable
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.inspect import inspect, show
from zarr.storage import ZipStore

# Files: what is in the shards, in the manifest's order


def columns(store: Path) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for entry in json.loads((store / "manifest.json").read_text())["shards"]:
        with ZipStore(store / entry["file"], mode="r") as archive:
            group = zarr.open_group(archive, mode="r")
            for name in ("tokens", "crops", "flips", "labels"):
                found.setdefault(name, []).append(group[name][:])
    return found


# Plain loops


def bits(counts) -> float:
    whole = sum(counts)
    return -sum(count / whole * math.log2(count / whole) for count in counts if count)


def equal_share(equal: int, pairs: int, chance: float | None) -> dict:
    return {"pairs": pairs, "equal": equal, "share": equal / pairs if pairs else None, "chance": chance}


def counted(tokens: np.ndarray, k: int) -> dict:
    """tokens (views, H, W)."""
    counts = Counter(tokens.reshape(-1).tolist())
    by_use = sorted(counts, key=lambda code: (-counts[code], code))
    coverage = []
    for share in (0.5, 0.9, 0.99):
        seen = codes = 0
        while seen < share * tokens.size:
            seen += counts[by_use[codes]]
            codes += 1
        coverage.append({"share": share, "codes": codes, "of_k": codes / k})
    entropy = bits(counts.values())
    return {
        "counts": [counts[code] for code in range(k)],
        "usage": {
            "codes": k,
            "used": len(counts),
            "dead": k - len(counts),
            "entropy_bits": entropy,
            "perplexity": 2**entropy,
        },
        "coverage": coverage,
        "most_used": [[code, counts[code]] for code in by_use[:10]],
        "least_used": [[code, counts[code]] for code in by_use[::-1][:10]],
        "dead_codes": [code for code in range(k) if code not in counts],
    }


def by_position(tokens: np.ndarray) -> dict:
    views, height, width = tokens.shape
    found = {name: [[None] * width for _ in range(height)] for name in ("perplexity", "entropy_bits", "used")}
    found |= {name: [[None] * width for _ in range(height)] for name in ("top_code", "top_share")}
    for row in range(height):
        for column in range(width):
            counts = Counter(tokens[:, row, column].tolist())
            top = min(counts, key=lambda code: (-counts[code], code))
            found["entropy_bits"][row][column] = bits(counts.values())
            found["perplexity"][row][column] = 2 ** bits(counts.values())
            found["used"][row][column] = len(counts)
            found["top_code"][row][column] = top
            found["top_share"][row][column] = counts[top] / views
    return found


def same_place(tokens: np.ndarray) -> dict:
    views, height, width = tokens.shape
    equal = 0
    for one in range(views):
        for other in range(one):
            equal += int((tokens[one] == tokens[other]).sum())
    counts = Counter(tokens.reshape(-1).tolist())
    chance = sum(count**2 for count in counts.values()) / tokens.size**2
    return equal_share(equal, views * (views - 1) // 2 * height * width, chance)


def pairs_of_places(tokens: np.ndarray, pairs: list) -> dict:
    """tokens (views, H, W); pairs of (row, column); chance over all pairs of views, one with itself included."""
    views = len(tokens)
    equal = chance = 0
    for one, other in pairs:
        equal += sum(int(view[one] == view[other]) for view in tokens)
        here, there = (Counter(tokens[:, at[0], at[1]].tolist()) for at in (one, other))
        chance += sum(here[code] * there[code] for code in here) / views**2 / len(pairs)
    return equal_share(equal, views * len(pairs), chance)


def neighbours(tokens: np.ndarray) -> dict:
    _, height, width = tokens.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    return {
        "horizontal": pairs_of_places(tokens, [((row, at), (row, at + 1)) for row, at in places if at + 1 < width]),
        "vertical": pairs_of_places(
            tokens, [((at, column), (at + 1, column)) for at, column in places if at + 1 < height]
        ),
        "anywhere": pairs_of_places(tokens, list(combinations(places, 2))),
    }


def overlaps(tokens, crops, flips, chance: float) -> dict:
    """tokens (n, V, H, W): every patch of a view whose centre lies in a later view of the image."""
    _, views, height, width = tokens.shape
    pairs, equal, view_pairs = {True: 0, False: 0}, {True: 0, False: 0}, 0
    for image in range(len(tokens)):
        for one, other in combinations(range(views), 2):
            met = 0
            mirrored = bool(flips[image, one] != flips[image, other])
            for row in range(height):
                for column in range(width):
                    at = patch_at(centre(crops[image, one], flips[image, one], row, column, height, width),
                                  crops[image, other], flips[image, other], height, width)  # fmt: skip
                    if at is not None:
                        met += 1
                        equal[mirrored] += int(tokens[image, one, row, column] == tokens[image, other][at])
            pairs[mirrored] += met
            view_pairs += met > 0
    return {
        "view_pairs": view_pairs,
        "all": equal_share(sum(equal.values()), sum(pairs.values()), chance),
        "same_flip": equal_share(equal[False], pairs[False], chance),
        "other_flip": equal_share(equal[True], pairs[True], chance),
    }


def centre(crop, flip, row: int, column: int, height: int, width: int) -> tuple[float, float]:
    across = (column + 0.5) / width
    return crop[0] + (row + 0.5) / height * crop[2], crop[1] + (1 - across if flip else across) * crop[3]


def patch_at(point, crop, flip, height: int, width: int) -> tuple[int, int] | None:
    down, across = (point[0] - crop[0]) / crop[2], (point[1] - crop[1]) / crop[3]
    row, column = math.floor(down * height), math.floor((1 - across if flip else across) * width)
    return (row, column) if 0 <= row < height and 0 <= column < width else None


def information(tokens: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Entropies of codes and classes, and their mutual information, by its definition."""
    joint = Counter((int(label), int(code)) for label, image in zip(labels, tokens, strict=True) for code in image.flat)
    whole = sum(joint.values())
    of_class, of_code = Counter(), Counter()
    for (label, code), count in joint.items():
        of_class[label] += count
        of_code[code] += count
    mutual = sum(
        count / whole * math.log2(count * whole / (of_class[label] * of_code[code]))
        for (label, code), count in joint.items()
    )
    return bits(of_code.values()), bits(of_class.values()), mutual


def labels_figures(tokens: list[np.ndarray], labels: list[np.ndarray]) -> dict:
    all_tokens, all_labels = np.concatenate(tokens), np.concatenate(labels)
    codes, classes, mutual = information(all_tokens, all_labels)
    by_offset = {}
    for offset in (0, -1, 1, 7, 13, 29):
        moved = [[shard[(at + offset) % len(shard)] for at in range(len(shard))] for shard in labels]
        _, _, other = information(all_tokens, np.concatenate(moved))
        by_offset[str(offset)] = other / ((codes + classes) / 2)
    return {
        "classes": len(set(all_labels.tolist())),
        "images": len(all_labels),
        "tokens": all_tokens.size,
        "class_entropy_bits": classes,
        "code_entropy_bits": codes,
        "mutual_information_bits": mutual,
        "nmi": mutual / ((codes + classes) / 2),
        "nmi_by_offset": by_offset,
    }


def expected(store: Path) -> dict:
    manifest = json.loads((store / "manifest.json").read_text())
    shards = columns(store)
    tokens = np.concatenate(shards["tokens"]).astype(int)
    crops, flips = np.concatenate(shards["crops"]), np.concatenate(shards["flips"])
    views = tokens.reshape(-1, *tokens.shape[2:])
    placed = same_place(views)
    return {
        "images": len(tokens),
        "views": len(views),
        "tokens": tokens.size,
        "labelled": len(tokens),
        **counted(views, manifest["k"]),
        "positions": by_position(views),
        "same_place": placed,
        "neighbours": neighbours(views),
        "overlaps": overlaps(tokens, crops, flips, placed["chance"]) if tokens.shape[1] > 1 else None,
        "labels": labels_figures(shards["tokens"], shards["labels"]),
    }


def expect_same(found, wanted, where: str = "") -> None:
    if isinstance(wanted, dict):
        for name, value in wanted.items():
            expect_same(found[name], value, f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            expect_same(one, other, f"{where}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12), where
    else:
        assert found == wanted, where


def test_every_figure_of_a_store_of_one_view_is_what_loops_count(chain):
    about = inspect(chain.tokens)
    wanted = expected(chain.tokens)
    expect_same(about, wanted)
    assert set(wanted) == set(about) - {
        *("kind", "path", "fingerprint", "codebook", "k", "grid", "shards", "storage", "skipped", "bytes", "view"),
        *("warnings", "quality"),  # test_quality.py
    }
    assert about["warnings"] == []


def test_every_figure_of_a_store_of_views_is_what_loops_count(views_store: Path):
    about = inspect(views_store)
    expect_same(about, expected(views_store))
    assert about["overlaps"]["other_flip"]["pairs"] > 1000
    stored = about["overlaps"]["supposing"]["as-stored"]
    assert (stored["pairs"], stored["equal"]) == tuple(about["overlaps"]["all"][name] for name in ("pairs", "equal"))
    assert about["warnings"] == []


RESEARCH_DATA = Path(__file__).parents[4] / "shared"


@pytest.mark.skipif(not RESEARCH_DATA.exists(), reason="needs ../shared/data and ../shared/clip")
def test_every_figure_of_photographs_is_what_loops_count(tmp_path: Path):
    images = tmp_path / "photographs.tar"
    with tarfile.open(RESEARCH_DATA / "data/tiny40-val-000000.tar") as source, tarfile.open(images, "w") as some:
        for _, member in zip(range(80), source, strict=False):
            some.addfile(member, io.BytesIO(source.extractfile(member).read()))
    tower = f"local-dir:{RESEARCH_DATA}/clip/lit-effnet-lite0"
    options = {"tower": tower, "layer": 3, "image_size": 128}
    build_codebook(images, tmp_path / "book", k=64, restarts=1, iterations=5, **options)
    encode_shards(images, tmp_path / "book", tmp_path / "tokens", crop="random-resized", views=2)
    about = inspect(tmp_path / "tokens")
    expect_same(about, expected(tmp_path / "tokens"))
    assert about["images"] == 40
    assert about["warnings"] == []


def test_a_codebook_says_how_far_its_centroids_are_apart(chain):
    book, about = Codebook.load(chain.codebook), inspect(chain.codebook)
    apart = np.array([[math.dist(one, other) for other in book.centroids] for one in book.centroids.astype(float)])
    np.fill_diagonal(apart, np.inf)
    near, found = apart.min(1), about["distances"]
    assert found["nearest"]["min"] == pytest.approx(near.min())
    assert found["nearest"]["median"] == pytest.approx(np.median(near))
    assert found["nearest"]["max"] == pytest.approx(near.max())
    assert found["nearest"]["mean"] == pytest.approx(near.mean())
    one, other, distance = found["closest"][0]
    assert sorted((one, other)) == sorted(np.unravel_index(apart.argmin(), apart.shape))
    assert distance == pytest.approx(near.min())
    assert len({tuple(pair[:2]) for pair in found["closest"]}) == len(found["closest"])
    assert found["of_a_patch"] == pytest.approx(math.sqrt(book.description["training"]["mean_squared_distance"]))
    assert found["twins"] == 0
    assert about["counts"] == book.counts.tolist()
    assert about["objective"] == book.description["objective"]
    assert about["warnings"] == []


@pytest.mark.parametrize(("rows", "k"), [(3, 5), (300, 20_000), (70_000, 40)])
def test_a_count_table_counts_what_was_added_in_any_pieces(rows: int, k: int):
    random, table = np.random.default_rng(0), CountTable(rows // 2, k)
    wanted = np.zeros((rows, k), dtype=int)
    for number, size in enumerate((7, 100_000, 1, 30_000)):
        table.grow(rows if number else rows // 2)
        at, codes = random.integers(0, rows if number else rows // 2, size), random.integers(0, k, size)
        table.add(at, codes.astype(np.uint16))
        np.add.at(wanted, (at, codes), 1)
    assert np.array_equal(table.counts(), wanted)
    assert np.array_equal(table.counts(), wanted)


def test_classes_that_are_too_many_for_memory_are_not_counted_against_codes(
    chain, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.setattr(counting._Labels, "_MOST_CELLS_OF_SAMPLE", 40)
    whole = inspect(chain.tokens)["labels"]
    assert whole["nmi_by_offset"] == {}
    assert whole["nmi"] > 0
    monkeypatch.setattr(counting._Labels, "_MOST_CELLS", 40)
    about = inspect(chain.tokens)
    none = {"mutual_information_bits": None, "nmi": None}
    assert about["labels"] == {**whole, **none}
    show(about)
    assert "too many to count" in capsys.readouterr().out


def test_labels_of_other_images_are_counted_in_every_nth_shard(chain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counting._Labels, "_SAMPLE", 96 * 64 // 2)
    shards = columns(chain.tokens)
    some = {name: [column[0], column[2]] for name, column in shards.items()}
    found = inspect(chain.tokens)["labels"]
    expect_same(found["nmi_by_offset"], labels_figures(some["tokens"], some["labels"])["nmi_by_offset"])
    assert found["nmi"] == pytest.approx(labels_figures(shards["tokens"], shards["labels"])["nmi"])


def test_a_token_beyond_the_codebook_is_refused_with_its_shard(chain, faulty):
    def change(rows: ShardRows) -> ShardRows:
        tokens = rows.tokens.copy()
        tokens[4, 0, 2, 1] = 16
        return replace(rows, tokens=tokens)

    with pytest.raises(DataError, match=rf"{chain.tars[0].stem} has token 16, and K is 16; delete shards"):
        inspect(faulty(chain.tokens, change))
