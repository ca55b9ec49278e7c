"""Labels as people have them: class names, numbers, lists, and two sources that disagree about them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from mapet.shared.tokens.store import TokenStore

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 6


def colour(number: int, shift: int = 0) -> bytes:
    """A picture whose colour gives away its class."""
    import io

    from PIL import Image

    pixels = np.random.default_rng(100 * number + shift).integers(0, 60, (64, 64, 3))
    pixels[..., number % 3] += 180
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(seed: int) -> list[tuple[int, str, bytes]]:
    """(class, name, picture) of all pictures of one set."""
    return [
        (number, f"{seed}{number}{at:02d}", colour(number, seed + at)) for number in range(3) for at in range(PER_CLASS)
    ]


@pytest.fixture
def folders(tmp_path: Path, write_folder) -> Callable[..., Path]:
    """folders("val", 50, names=CLASSES, only=None): a folder of class folders."""

    def make(name: str, seed: int, names=CLASSES, only=(0, 1, 2)) -> Path:
        files = {f"{names[c]}/{key}.png": data for c, key, data in pictures(seed) if c in only}
        return write_folder(tmp_path / name, files)

    return make


@pytest.fixture
def tars(tmp_path: Path, write_tar) -> Callable[..., Path]:
    """tars("val", 50, labels=["0", "1", "2"]): a folder with one tar of pictures with .cls members."""

    def make(name: str, seed: int, labels=("0", "1", "2"), member="cls", extra=()) -> Path:
        (tmp_path / name).mkdir()
        files = []
        for c, key, data in pictures(seed):
            label = labels[c] if isinstance(labels[c], bytes) else labels[c].encode()
            files += [(f"{key}.png", data), (f"{key}.{member}", label)]
        write_tar(tmp_path / name / "0.tar", [*files, *extra])
        return tmp_path / name

    return make


@pytest.fixture
def flat(tmp_path: Path, write_folder) -> Callable[..., Path]:
    return lambda name, seed: write_folder(tmp_path / name, {f"{key}.png": data for _, key, data in pictures(seed)})


@pytest.fixture
def probe(mapet, lab) -> Callable:
    return lambda train, val, *more: mapet("train", "probe", lab.run, "--images", train, "--val", val, *more)


def accuracies(outcome) -> list[float]:
    """(linear, k-NN) in per cent."""
    return [float(value) for value in re.findall(r"([0-9.]+)%", outcome.ok().stdout)[-2:]]


def expect_learned(outcome) -> None:
    """Colours are told apart by any features; 33 % is chance, and 0 % the fault of labels that do not fit."""
    assert min(accuracies(outcome)) > 60, outcome.stdout


def test_validation_lacks_the_first_class(folders, probe):
    """val folder lacks the first class: joined by name, and the missing class is named"""
    outcome = probe(folders("train", 0), folders("val", 50, only=(1, 2)))
    expect_learned(outcome)
    assert "1 of the 3 classes of the training images are not among the validation images (ant)" in outcome.text


def test_stray_class_folder_in_train(folders, probe, write_folder, tmp_path: Path):
    """stray class folder that sorts first in train: joined by name, and the stray class is named"""
    write_folder(tmp_path / "train", {"aaa/stray.png": colour(1, 99)})
    outcome = probe(folders("train", 0), folders("val", 50))
    expect_learned(outcome)
    assert "(aaa)" in outcome.text


def test_stray_class_folder_in_val(folders, probe, write_folder, tmp_path: Path):
    """val folder with a class that train does not have: said, and its images count as wrong"""
    write_folder(tmp_path / "val", {"zoo/stray.png": colour(1, 99)})
    outcome = probe(folders("train", 0), folders("val", 50))
    expect_learned(outcome)
    assert "not among the training images (zoo); their images count as wrong" in outcome.text


def test_numbers_off_by_one(tars, probe):
    """val labels 1..N and train labels 0..N-1: refused with the way out"""
    outcome = probe(tars("train", 0), tars("val", 50, ["1", "2", "3"]))
    outcome.refused(1, "1 to 3", "0 to 2", "plus one", "--val-labels FILE")


def test_numbers_off_by_one_of_a_part(tars, probe, folders):
    """val labels are some of 1..N and train labels 0..N-1: refused with the way out"""
    train, val = folders("train", 0, names=("0", "1", "2")), folders("val", 50, ("1", "2", "3"), only=(1, 2))
    probe(train, val).refused(1, "plus one", "--val-labels FILE")


def test_folders_against_numbers(folders, tars, probe):
    """train in class folders, val with .cls numbers: refused with --classes FILE"""
    probe(folders("train", 0), tars("val", 50)).refused(1, "numbers", "names", "ant", "--classes FILE")


def test_folders_against_numbers_with_classes(folders, tars, probe, tmp_path: Path):
    """the same with --classes FILE: joined by name, whatever the order of the numbers"""
    (tmp_path / "names.txt").write_text("cat\nant\nbee\n")
    val = tars("val", 50, ["1", "2", "0"])
    expect_learned(probe(folders("train", 0), val, "--classes", tmp_path / "names.txt"))


def test_a_number_without_a_name(folders, tars, probe, tmp_path: Path):
    """--classes FILE with fewer lines than there are numbers: refused"""
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    val = tars("val", 50)
    probe(folders("train", 0), val, "--classes", tmp_path / "names.txt").refused(1, "class 2", "0 to 1")


def test_two_classes_of_one_name(folders, tars, probe, tmp_path: Path):
    """--classes FILE with one name twice, as ImageNet's crane: refused with both lines"""
    (tmp_path / "names.txt").write_text("crane\nbee\ncrane\n")
    val = tars("val", 50)
    probe(folders("train", 0), val, "--classes", tmp_path / "names.txt").refused(1, "'crane'", "lines 1 and 3")


def test_numbered_folders_against_numbers(folders, tars, probe):
    """train in folders named 0, 2, 10 and val with these .cls numbers: the same classes"""
    numbers = ("0", "2", "10")
    expect_learned(probe(folders("train", 0, numbers), tars("val", 50, numbers)))


def test_names_in_cls_members(folders, tars, probe):
    """.cls members with names against class folders: joined by name"""
    expect_learned(probe(folders("train", 0), tars("val", 50, CLASSES)))


def test_classes_txt_beside_tars(folders, tars, probe):
    """classes.txt beside tars of .cls numbers against class folders: joined by name"""
    val = tars("val", 50, ["1", "2", "0"])
    (val / "classes.txt").write_text("cat\nant\nbee\n")
    expect_learned(probe(folders("train", 0), val))


def test_no_class_in_common(folders, probe):
    """train and val without a class in common: refused"""
    outcome = probe(folders("train", 0), folders("val", 50, ("Ant", "Bee", "Cat")))
    outcome.refused(1, "No class", "Ant", "ant")


def test_huge_class_numbers(tars, probe):
    """labels such as 7715103: the classes that occur are numbered (16.6 GB before)"""
    numbers = ["7715103", "12", "900000000000"]
    expect_learned(probe(tars("train", 0, numbers), tars("val", 50, numbers)))


def test_negative_class_number(tars, probe):
    """a negative class number in a probe: refused with the image's key"""
    probe(tars("train", 0, ["0", "1", "-3"]), tars("val", 50)).refused(1, "'0200'", "class number -3")


def test_flat_val_with_a_list_of_names(folders, flat, probe, tmp_path: Path):
    """flat val with --val-labels FILE, one synset a line in sorted file order"""
    (tmp_path / "val.txt").write_text(
        "".join(f"{CLASSES[c]}\n" for c, _, _ in sorted(pictures(50), key=lambda p: p[1]))
    )
    expect_learned(probe(folders("train", 0), flat("val", 50), "--val-labels", tmp_path / "val.txt"))


LISTS = {
    "csv": lambda rows: "ImageId,Label\n" + "".join(f"{key},{name}\n" for key, name in rows),
    "tsv with paths": lambda rows: "path\tsynset\n" + "".join(f"val/{key}.png\t{name}\n" for key, name in rows),
    "json lines": lambda rows: "".join(json.dumps({"key": key, "label": name}) + "\n" for key, name in rows),
    "file and label": lambda rows: "".join(f"{key}.png {name}\n" for key, name in rows),
}


@pytest.mark.parametrize("kind", LISTS)
def test_flat_val_with_a_list_that_names_images(folders, flat, probe, tmp_path: Path, kind: str):
    """flat val with --val-labels FILE that names its images, in any order"""
    rows = [(key, CLASSES[c]) for c, key, _ in pictures(50)][::-1]
    (tmp_path / "list").write_text(LISTS[kind](rows))
    expect_learned(probe(folders("train", 0), flat("val", 50), "--val-labels", tmp_path / "list"))


def test_a_list_with_too_few_lines(folders, flat, probe, tmp_path: Path):
    """a list with fewer lines than images: refused with both numbers"""
    (tmp_path / "val.txt").write_text("ant\n" * 17)
    probe(folders("train", 0), flat("val", 50), "--val-labels", tmp_path / "val.txt").refused(
        1, "17 lines", "18 images"
    )


def test_a_list_with_an_empty_line(folders, flat, probe, tmp_path: Path):
    """a list with an empty line in the middle: refused with its number, not shifted"""
    (tmp_path / "val.txt").write_text("ant\n" * 5 + "\n" + "ant\n" * 12)
    probe(folders("train", 0), flat("val", 50), "--val-labels", tmp_path / "val.txt").refused(1, "empty line 6")


def test_a_list_of_other_images(folders, flat, probe, tmp_path: Path):
    """a list that names none of the images: refused"""
    (tmp_path / "val.csv").write_text("key,label\nx,ant\n")
    probe(folders("train", 0), flat("val", 50), "--val-labels", tmp_path / "val.csv").refused(1, "names none")


def test_a_list_that_lacks_an_image(folders, flat, probe, tmp_path: Path):
    """a list that lacks one image: refused with the image's key"""
    rows = "".join(f"{key},{CLASSES[c]}\n" for c, key, _ in pictures(50)[:-1])
    (tmp_path / "val.csv").write_text("key,label\n" + rows)
    probe(folders("train", 0), flat("val", 50), "--val-labels", tmp_path / "val.csv").refused(1, "'50205'", "no label")


def test_labels_in_json_members(folders, tars, probe):
    """tars whose labels are a nested field of JSON members: --label-field meta.class"""
    labels = [json.dumps({"meta": {"class": name}}) for name in CLASSES]
    train, val = tars("train", 0, labels, "json"), tars("val", 50, labels, "json")
    expect_learned(probe(train, val, "--label-field", "meta.class"))


def test_json_members_without_the_field(tars, probe):
    """--label-field that the JSON members lack: refused with the member's name"""
    train, val = tars("train", 0, ["{}"] * 3, "json"), tars("val", 50, ["{}"] * 3, "json")
    probe(train, val, "--label-field", "class").refused(1, "0000.json", "'class'")


@pytest.fixture
def encode(mapet, lab, tmp_path: Path) -> Callable:
    def run(images: Path, *more):
        return mapet(
            *("tokenize", "encode-shards", images, "--codebook", lab.codebook, "--out", tmp_path / "tokens", *more)
        )

    return run


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"1.5", b"1 2", b"a\nb", b"9" * 30, b"x" * 2000])
def test_an_unreadable_label(tars, encode, tmp_path: Path, text: bytes):
    """an unreadable label with --on-error skip: the image is kept without one and counted (it was lost)"""
    extra = [("odd.png", colour(0, 7)), ("odd.cls", text)]
    outcome = encode(tars("train", 0, extra=extra), "--on-error", "skip").ok()
    store = TokenStore(tmp_path / "tokens")
    assert len(store) == 3 * PER_CLASS + 1
    assert (store["odd"].label, store["0000"].label) == (None, 0)
    assert [(key, "odd.cls" in reason) for _, key, reason in store.unlabelled()] == [("odd", True)]
    assert store.skipped() == []
    assert "1 image(s) are kept" in outcome.text


def test_all_labels_unreadable(tars, encode, tmp_path: Path):
    """every label unreadable with --on-error skip: all images are kept (0 images and exit 0 before)"""
    encode(tars("train", 0, [b"\xff"] * 3), "--on-error", "skip").ok()
    assert len(TokenStore(tmp_path / "tokens")) == 3 * PER_CLASS


def test_an_unreadable_label_stops(tars, encode):
    """an unreadable label without --on-error skip: refused with the member's name"""
    encode(tars("train", 0, [b"\xff"] * 3)).refused(1, "unreadable label", "0000.cls", "not UTF-8")


@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_a_store_keeps_class_names(mapet, folders, encode, tmp_path: Path, format: str):
    """a store of class folders keeps the names: inspect --key shows them, verify passes, several classes a shard"""
    encode(folders("train", 0), "--format", format).ok()
    store = TokenStore(tmp_path / "tokens")
    (entry,) = store.entries.values()
    assert entry["classes"] == list(CLASSES)
    report = json.loads(mapet("tokenize", "inspect", store.path, "--key", "cat/0200", "--json").ok().stdout)
    assert (report["image"]["label"], report["labels"]["classes"], report["labelled"]) == ("cat", 3, 18)
    mapet("tokenize", "verify", store.path, "--images", tmp_path / "train").ok()


def test_a_store_counts_names_across_shards(mapet, encode, tmp_path: Path, write_tar):
    """two tars with other classes each: inspect counts classes by name, not by their numbers in the shard"""
    (tmp_path / "two").mkdir()
    for tar, (a, b) in {"0": (0, 1), "1": (1, 2)}.items():
        files = [(f"{tar}{c}{n}.png", colour(c, n)) for c in (a, b) for n in range(2)]
        labels = [(f"{tar}{c}{n}.cls", CLASSES[c].encode()) for c in (a, b) for n in range(2)]
        write_tar(tmp_path / f"two/{tar}.tar", files + labels)
    encode(tmp_path / "two").ok()
    store = TokenStore(tmp_path / "tokens")
    assert {image.key: image.label for image in store.tokens()}["110"] == "bee"
    report = json.loads(mapet("tokenize", "inspect", store.path, "--json").ok().stdout)
    assert report["labels"]["classes"] == 3


def test_a_list_of_labels_is_stored(encode, flat, tmp_path: Path):
    """encode-shards --labels FILE of a flat folder: labels are stored; other ones later are refused"""
    images = flat("flat", 0)
    (tmp_path / "l.csv").write_text("key,label\n" + "".join(f"{key},{CLASSES[c]}\n" for c, key, _ in pictures(0)))
    encode(images, "--labels", tmp_path / "l.csv").ok()
    assert TokenStore(tmp_path / "tokens")["0105"].label == "bee"
    encode(images, "--labels", tmp_path / "l.csv").ok()
    encode(images).refused(2, "--labels", "none are given")


def test_features_keep_class_names(mapet, lab, folders, tmp_path: Path):
    """train features of class folders: the group lists the names that labels are indices of"""
    images, out = folders("train", 0), tmp_path / "f.zarr"
    mapet("train", "features", images, "--weights", lab.run, "--out", out).ok()
    group = zarr.open_group(out, mode="r")
    names = [group.attrs["classes"][label] for label in group["labels"][:]]
    assert names == [key.partition("/")[0] for key in group["keys"][:]]


def test_probe_during_a_run(mapet, lab, folders, tars, tmp_path: Path):
    """probe.images in folders and probe.val in numbers: refused before the first step; probe.classes joins them"""
    images = ["--images", lab.images, "--tokens", lab.tokens, "--out", tmp_path / "run", *lab.settings]
    sets = ["--set", f"probe.images={folders('train', 0)}", "--set", f"probe.val={tars('val', 50)}"]
    mapet("train", "pretrain", *images, *sets).refused(1, "--classes FILE (probe.classes)")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    mapet("train", "pretrain", *images, *sets, "--set", f"probe.classes={tmp_path / 'names.txt'}").ok()
