"""Situations of sources: how people's images lie on disk, and how they name them on the command line."""

import gzip
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from mapet.shared.tokens.store import TokenStore
from PIL import Image

Encode = Callable[..., list[str]]


@pytest.fixture
def encode(mapet, lab, tmp_path: Path) -> Encode:
    """encode(*IMAGES, "--option", value, out="tokens", cwd=None): encodes and returns the sorted keys of the store."""

    def run(*words: object, out: str = "tokens", cwd: Path | None = None) -> list[str]:
        mapet("tokenize", "encode-shards", *words, "--codebook", lab.codebook, "--out", tmp_path / out, cwd=cwd).ok()
        return keys_of(tmp_path / out)

    return run


@pytest.fixture
def refuse(mapet, lab, tmp_path: Path) -> Callable[..., None]:
    """refuse(code, [parts], *IMAGES, ...): encoding ends with this code and a sentence of these parts, writing
    nothing."""

    def run(code: int, parts: list[str], *words: object) -> None:
        out = tmp_path / "tokens"
        mapet("tokenize", "encode-shards", *words, "--codebook", lab.codebook, "--out", out).refused(code, *parts)
        assert not (out / "manifest.json").exists()

    return run


def keys_of(store: Path) -> list[str]:
    import zarr

    keys = []
    for shard in sorted((store / "shards").glob("*.zarr.zip")):
        group = zarr.open_group(zarr.storage.ZipStore(shard, mode="r"), mode="r")
        keys += [str(key) for key in group["keys"][:]]
    return sorted(keys)


def labels_of(store: Path) -> dict[str, object]:
    """The label of each image: a class number or name, None without one."""
    opened = TokenStore(store)
    return {
        str(key): rows.label(row) for rows in map(opened.read_rows, opened.entries) for row, key in enumerate(rows.keys)
    }


def entries_of(store: Path) -> list[dict]:
    return json.loads((store / "manifest.json").read_text())["shards"]


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


# What a folder means


@pytest.mark.parametrize("names", [("train", "val"), ("test", "training"), ("Train", "Validation")])
def test_splits(tmp_path: Path, write_folder, picture, refuse, names):
    """A folder with train/ and val/ inside is given as if they were classes."""
    root = write_folder(tmp_path / "data", {f"{name}/cat/{name}.jpg": picture() for name in names})
    refuse(2, [f"{names[0]}/ and {names[1]}/", "parts of a data set", f"{root}/{names[0]}"], root)


def test_a_lone_split(tmp_path: Path, write_folder, picture, refuse):
    """The folder above train/ is given, so that "train" would be the only class."""
    root = write_folder(tmp_path / "data", {"train/cat/a.jpg": picture(), "train/dog/b.jpg": picture(1)})
    refuse(2, ["train/, parts of a data set", f"{root}/train"], root)


def test_both_splits(tmp_path: Path, write_folder, picture, encode):
    """Both splits are given as two folders."""
    write_folder(tmp_path, {"data/train/cat/a.jpg": picture(), "data/val/dog/b.jpg": picture(1)})
    assert encode(tmp_path / "data/train", tmp_path / "data/val") == ["cat/a", "dog/b"]
    assert labels_of(tmp_path / "tokens") == {"cat/a": "cat", "dog/b": "dog"}


def test_equal_names_in_both_splits(tmp_path: Path, write_folder, picture, encode, refuse):
    """Both splits hold images of one name; --key-prefix tar tells them apart."""
    write_folder(tmp_path, {"train/cat/a.jpg": picture(), "val/cat/a.jpg": picture(1)})
    refuse(1, ["'cat/a' is in both", "--key-prefix tar"], tmp_path / "train", tmp_path / "val")
    shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
    assert encode(tmp_path / "train", tmp_path / "val", "--key-prefix", "tar") == ["train/cat/a", "val/cat/a"]


def test_several_images_of_an_option(mapet, lab, tmp_path: Path):
    """--images is given twice, to verify and to probe."""
    tars = [word for tar in sorted(lab.images.glob("*.tar")) for word in ("--images", tar)]
    mapet("tokenize", "verify", lab.tokens, *tars).ok()
    mapet("train", "probe", lab.run, *tars, "--val", lab.images).ok()


def test_no_images_for_tokens_alone(mapet, lab, tmp_path: Path):
    """pretrain without --images, on tokens without images."""
    words = ["--tokens", lab.tokens, "--out", tmp_path / "run"]
    mapet("train", "pretrain", *words, *lab.settings).refused(2, "holds no images", "--images")


def test_a_class_called_test(tmp_path: Path, write_folder, picture, encode):
    """One class among others is called "train"."""
    root = write_folder(tmp_path / "coco", {f"{name}/{name}.jpg": picture() for name in ("car", "bus", "train")})
    assert len(encode(root)) == 3


def test_a_tar_beside_class_folders(tmp_path: Path, write_folder, write_tar, picture, refuse):
    """ImageNet's original tar still lies beside the unpacked class folders."""
    root = write_folder(tmp_path / "train", {"n01440764/a.jpg": picture()})
    write_tar(root / "ILSVRC2012_img_train.tar", {"b.jpg": picture(1)})
    refuse(2, ["ILSVRC2012_img_train.tar", "n01440764/a.jpg", "tars and images"], root)


def test_a_tar_beside_images(tmp_path: Path, write_folder, write_tar, picture, refuse):
    """A tar lies beside loose images."""
    root = write_folder(tmp_path / "photos", {"a.jpg": picture()})
    write_tar(root / "backup.tar", {"b.jpg": picture(1)})
    refuse(2, ["backup.tar", "a.jpg"], root)


def test_compressed_beside_plain_tars(tmp_path: Path, write_tar, picture, refuse):
    """A .tar.gz lies beside tars."""
    (tmp_path / "data").mkdir()
    tar = write_tar(tmp_path / "data/a.tar", {"a.jpg": picture()})
    (tmp_path / "data/b.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
    refuse(2, ["two kinds of tars", "a.tar", "b.tar.gz"], tmp_path / "data")


def test_nested_beside_plain_tars(tmp_path: Path, write_tar, picture, refuse):
    """Tars lie in a subfolder beside tars."""
    (tmp_path / "data/more").mkdir(parents=True)
    write_tar(tmp_path / "data/a.tar", {"a.jpg": picture()})
    write_tar(tmp_path / "data/more/b.tar", {"b.jpg": picture(1)})
    refuse(2, ["a.tar", "more/b.tar"], tmp_path / "data")


def test_text_beside_tars_is_passed_over(mapet, lab, tmp_path: Path, write_tar, picture):
    """A README and an index lie beside tars: one line says so."""
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data/a.tar", {"a.jpg": picture(), "a.txt": b"a cat", "b.jpg": picture(1), "b.txt": b"-"})
    (tmp_path / "data/README.md").write_text("hello")
    outcome = mapet(
        "tokenize", "encode-shards", tmp_path / "data", "--codebook", lab.codebook, "--out", tmp_path / "tokens"
    ).ok()
    assert f"{tmp_path}/data: took 1 tar (a.tar); passed over 1 .md (README.md)." in outcome.stderr
    assert "In the tars, passed over 2 .txt (a.txt)." in outcome.stderr


def test_one_line_about_a_folder(mapet, lab, tmp_path: Path, write_folder, picture):
    """A folder of class folders with other files: one line says what was taken."""
    files = {"ant/a.jpg": picture(), "bee/b.jpg": picture(1), "bee/notes.txt": b"-", ".DS_Store": b"-"}
    root = write_folder(tmp_path / "data", files)
    outcome = mapet("tokenize", "encode-shards", root, "--codebook", lab.codebook, "--out", tmp_path / "tokens").ok()
    assert "took 2 images in 2 class folders (ant to bee); passed over" in outcome.stderr
    assert "1 .txt (bee/notes.txt)" in outcome.stderr
    assert "1 hidden or of the system (.DS_Store)" in outcome.stderr


def test_features_say_what_they_took(mapet, lab, tmp_path: Path):
    """features, too, says what it took."""
    outcome = mapet("train", "features", lab.images, "--weights", lab.run, "--out", tmp_path / "f.zarr").ok()
    assert f"{lab.images}: took 2 tars" in outcome.stderr


# Hidden and system names


SYSTEM = [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails", "lost+found", "PaxHeaders.123", "#recycle"]


@pytest.mark.parametrize("name", SYSTEM)
def test_system_folders(tmp_path: Path, write_folder, picture, encode, name):
    """A system's folder beside class folders is no class."""
    root = write_folder(
        tmp_path / "data", {"ant/a.jpg": picture(), "zebra/z.jpg": picture(1), f"{name}/a.jpg": picture(2)}
    )
    assert encode(root) == ["ant/a", "zebra/z"]
    assert labels_of(tmp_path / "tokens") == {"ant/a": "ant", "zebra/z": "zebra"}


@pytest.mark.parametrize("name", SYSTEM)
def test_system_members(tmp_path: Path, write_tar, picture, encode, name):
    """A system's folder in a tar holds no images."""
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": picture(), f"{name}/b.jpg": picture(1), f"{name}/a.cls": b"7"})
    assert encode(tar) == ["a"]


@pytest.mark.parametrize("name", ["._a.tar", ".x.tar"])
def test_hidden_tars(tmp_path: Path, write_tar, picture, encode, name):
    """macOS's ._a.tar, or another hidden tar, lies beside a.tar."""
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data/a.tar", {"a.jpg": picture()})
    (tmp_path / "data" / name).write_bytes(b"finder")
    assert encode(tmp_path / "data") == ["a"]


def test_a_hidden_tar_by_name(tmp_path: Path, write_tar, picture, refuse):
    """A hidden tar is given by its name: its shard would never be found again."""
    refuse(1, [".x.tar", "hidden name", "rename"], write_tar(tmp_path / ".x.tar", {"a.jpg": picture()}))


# Several pictures under a key, and where a key ends


def depth_first(picture) -> dict[str, bytes]:
    return {"a.depth.png": picture(1, "PNG"), "a.jpg": picture(0), "b.jpg": picture(2)}


def test_a_depth_map(tmp_path: Path, write_tar, picture, refuse):
    """A tar holds a depth map beside each image."""
    parts = ["'a.depth.png' and 'a.jpg'", "--image-field", "--key-until last-dot"]
    refuse(1, parts, write_tar(tmp_path / "x.tar", depth_first(picture)))


def test_a_depth_map_is_chosen_away(tmp_path: Path, write_tar, picture, encode):
    """--image-field jpg takes the image and not the depth map."""
    tar = write_tar(tmp_path / "x.tar", depth_first(picture))
    assert encode(tar, "--image-field", "jpg") == ["a", "b"]
    plain = write_tar(tmp_path / "y.tar", {"a.jpg": picture(0), "b.jpg": picture(2)})
    encode(plain, out="plain")
    assert crcs(tmp_path / "tokens") == crcs(tmp_path / "plain")


def crcs(store: Path) -> list[int]:
    import zarr

    (shard,) = (store / "shards").glob("*.zarr.zip")
    return zarr.open_group(zarr.storage.ZipStore(shard, mode="r"), mode="r")["crc32"][:].tolist()


def test_a_depth_map_with_skip(tmp_path: Path, write_tar, picture, encode):
    """With --on-error skip a key with two pictures is left out and counted; nothing is guessed."""
    tar = write_tar(tmp_path / "x.tar", depth_first(picture))
    assert encode(tar, "--on-error", "skip") == ["b"]
    assert [key for key, _ in entries_of(tmp_path / "tokens")[0]["skipped"]] == ["a"]


def test_the_choice_is_kept(mapet, lab, tmp_path: Path, write_tar, picture, encode):
    """verify and more views need not be told --image-field again; another one is refused."""
    tar, store = write_tar(tmp_path / "x.tar", depth_first(picture)), tmp_path / "tokens"
    crop = ["--crop", "random-resized"]
    encode(tar, "--image-field", "jpg", *crop)
    mapet("tokenize", "verify", store, "--images", tar).ok()
    assert encode(tar, *crop, "--views", 2) == ["a", "b"]
    again = ["--codebook", lab.codebook, "--out", store, *crop, "--image-field", "depth.png"]
    mapet("tokenize", "encode-shards", tar, *again).refused(2, "begun with --image-field jpg", "depth.png")


def test_a_store_of_nothing(tmp_path: Path, write_tar, refuse):
    """Every image is unusable and is to be skipped: no empty store."""
    tar = write_tar(tmp_path / "x.tar", {"a.heic": b"-", "b.heic": b"-"})
    refuse(1, ["None of the images can be used", "a.heic"], tar, "--on-error", "skip")


def test_a_store_of_undecodable_images(tmp_path: Path, write_tar, refuse):
    """No image can be decoded and all are to be skipped: no empty store."""
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": b"no image", "b.jpg": b"-"})
    refuse(1, ["would hold no images", "2 were left out"], tar, "--on-error", "skip")


def test_dots_in_a_folder(mapet, lab, tmp_path: Path, write_folder, picture, encode):
    """File names in a folder have dots, as in IMG_1.small.jpg and IMG_1.large.jpg."""
    names = ["shot.1.jpg", "shot.2.jpg", "v1.0/a.b.c.jpg"]
    root = write_folder(tmp_path / "photos", {name: picture(seed) for seed, name in enumerate(names)})
    assert encode(root) == ["shot.1", "shot.2", "v1.0/a.b.c"]
    mapet("tokenize", "verify", tmp_path / "tokens", "--images", root).ok()


def test_dots_in_a_folder_as_tars(mapet, lab, tmp_path: Path, write_folder, picture):
    """The same with --format webdataset: keys with dots survive."""
    root = write_folder(tmp_path / "photos", {f"shot.{seed}.jpg": picture(seed) for seed in range(2)})
    words = ["--codebook", lab.codebook, "--out", tmp_path / "t", "--format", "webdataset"]
    mapet("tokenize", "encode-shards", root, *words).ok()
    mapet("tokenize", "verify", tmp_path / "t", "--images", root).ok()
    mapet("tokenize", "inspect", tmp_path / "t", "--key", "shot.1").ok()


def test_dots_in_a_tar(tmp_path: Path, write_tar, picture, encode, refuse):
    """Member names have dots: WebDataset's rule makes keys collide, and the message says how to go on."""
    tar = write_tar(tmp_path / "x.tar", {"shot.1.jpg": picture(), "shot.2.jpg": picture(1)})
    refuse(1, ["'shot.1.jpg' and 'shot.2.jpg'", "first dot", "--key-until last-dot"], tar)
    shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
    assert encode(tar, "--key-until", "last-dot") == ["shot.1", "shot.2"]


def test_training_knows_the_stores_keys(mapet, lab, tmp_path: Path, write_folder, picture, encode):
    """pretrain joins keys as the store was encoded, without being told."""
    root = write_folder(tmp_path / "photos", {f"shot.{seed}.jpg": picture(seed) for seed in range(16)})
    encode(root)
    paths = ["--images", root, "--tokens", tmp_path / "tokens", "--out", tmp_path / "run"]
    mapet("train", "pretrain", *paths, *lab.settings).ok()


def test_an_unknown_rule(tmp_path: Path, write_tar, picture, refuse):
    """A misspelt --key-until."""
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": picture()})
    refuse(2, ["--key-until second-dot", "first-dot or last-dot"], tar, "--key-until", "second-dot")


# ImageNet and other class tars


@pytest.fixture
def classes(picture) -> dict[str, dict[str, bytes]]:
    return {
        name: {f"{name}_{seed}.JPEG": picture(10 * number + seed) for seed in range(2)}
        for number, name in enumerate(["n01440764", "n01443537"])
    }


def test_imagenet_as_downloaded(mapet, tmp_path: Path, write_tar, classes, encode):
    """ILSVRC2012_img_train.tar is a tar of class tars."""
    tar = write_tar(tmp_path / "train.tar", {f"{name}.tar": tar_bytes(files) for name, files in classes.items()})
    assert encode(tar) == sorted(name.removesuffix(".JPEG") for files in classes.values() for name in files)
    assert labels_of(tmp_path / "tokens")["n01443537_1"] == "n01443537"
    assert [entry["name"] for entry in entries_of(tmp_path / "tokens")] == ["n01440764", "n01443537"]
    mapet("tokenize", "verify", tmp_path / "tokens", "--images", tar).ok()


def test_pretraining_on_imagenet_as_downloaded(mapet, lab, tmp_path: Path, write_tar, picture, encode):
    """The images of a tar of tars are read in place, in training too."""
    inner = {f"n0000000{n}.tar": tar_bytes({f"{n}_{s}.JPEG": picture(9 * n + s) for s in range(8)}) for n in range(2)}
    tar = write_tar(tmp_path / "train.tar", inner)
    encode(tar)
    paths = ["--images", tar, "--tokens", tmp_path / "tokens", "--out", tmp_path / "run"]
    mapet("train", "pretrain", *paths, *lab.settings).ok()


def test_a_folder_of_class_tars(tmp_path: Path, write_tar, classes, encode):
    """A folder of ImageNet's class tars: their names are the classes."""
    (tmp_path / "train").mkdir()
    for name, files in classes.items():
        write_tar(tmp_path / f"train/{name}.tar", files)
    encode(tmp_path / "train")
    assert labels_of(tmp_path / "tokens")["n01440764_0"] == "n01440764"
    assert labels_of(tmp_path / "tokens")["n01443537_0"] == "n01443537"


def test_a_folder_of_own_class_tars(tmp_path: Path, write_tar, picture, encode):
    """Class tars with names of one's own: --label-from tar."""
    (tmp_path / "data").mkdir()
    for number, name in enumerate(["cat", "dog"]):
        write_tar(tmp_path / f"data/{name}.tar", {f"{name}1.jpg": picture(number)})
    encode(tmp_path / "data", out="without")
    assert labels_of(tmp_path / "without") == {"cat1": None, "dog1": None}
    encode(tmp_path / "data", "--label-from", "tar")
    assert labels_of(tmp_path / "tokens") == {"cat1": "cat", "dog1": "dog"}


# How IMAGES are named


@pytest.fixture
def tars(tmp_path: Path, write_tar, picture) -> Path:
    """A folder with t-0.tar, t-2.tar, t-4.tar; each holds one image of its number."""
    (tmp_path / "data").mkdir()
    for number in (0, 2, 4):
        write_tar(tmp_path / f"data/t-{number}.tar", {f"{number}.jpg": picture(number)})
    return tmp_path / "data"


@pytest.mark.parametrize(
    "words",
    [
        ["{data}/t-{0..4..2}.tar"],
        ["{data}/t-*.tar"],
        ["{data}/t-[024].tar"],
        ["{data}/t-?.tar"],
        ["{root}/*/t-{0,2,4}.tar"],
        ["{data}/t-0.tar", "{data}/t-2.tar", "{data}/t-4.tar"],
        ["{data}/t-{0,2}.tar::{data}/t-4.tar"],
        ["$DATA/t-*.tar"],
        ["${DATA}/t-{0..4..2}.tar"],
        ["~/data"],
        ["~/data/t-*.tar"],
        ["{root}/**/*.tar"],
    ],
    ids=lambda words: " ".join(words),
)
def test_ways_to_name_tars(tmp_path: Path, tars: Path, encode, monkeypatch, words):
    """Step ranges, globs, several IMAGES, a::b, $VAR and ~."""
    monkeypatch.setenv("DATA", str(tars))
    monkeypatch.setenv("HOME", str(tmp_path))
    given = [word.replace("{data}", str(tars)).replace("{root}", str(tmp_path)) for word in words]
    assert encode(*given) == ["0", "2", "4"]


def test_a_variable_that_is_not_set(tmp_path: Path, refuse):
    """$VAR is not set."""
    refuse(1, ["$NO_SUCH_VARIABLE", "does not exist", "the environment has no"], "$NO_SUCH_VARIABLE/t.tar")


def test_gaps(tars: Path, encode, refuse):
    """A range has gaps: they are named, and --on-error skip goes on."""
    refuse(1, ["t-1.tar and 1 more", "do not exist", "--on-error skip"], f"{tars}/t-{{0..4}}.tar")
    assert encode(f"{tars}/t-{{0..4}}.tar", "--on-error", "skip") == ["0", "2", "4"]


def test_a_range_of_nothing(tars: Path, refuse):
    """No tar of a range exists, and --on-error skip cannot help."""
    refuse(1, ["do not exist", "check the pattern"], f"{tars}/u-{{0..4}}.tar", "--on-error", "skip")


def test_a_glob_of_nothing(tars: Path, refuse):
    """A glob matches nothing."""
    refuse(1, ["matches no tars", "u-*.tar"], f"{tars}/u-*.tar")


@pytest.mark.parametrize("name", ["my {2024} data", "set{a,b}", "a[1]", "wild*", "tilde~", "a::b"])
def test_odd_folder_names(tmp_path: Path, tars: Path, encode, name):
    """A folder's name has braces, brackets, a star, ~ or ::."""
    os.rename(tars, tmp_path / name)
    assert encode(tmp_path / name) == ["0", "2", "4"]
    if "::" not in name:
        assert encode(f"{tmp_path}/{name}/t-{{0..4..2}}.tar", out="again") == ["0", "2", "4"]


def test_nested_tars(tmp_path: Path, write_tar, picture, encode):
    """LAION's part-*/00000.tar: equal base names and equal keys in nested folders."""
    for part in range(2):
        (tmp_path / f"laion/part-{part}").mkdir(parents=True)
        write_tar(tmp_path / f"laion/part-{part}/00000.tar", {"000000.jpg": picture(part)})
    keys = ["part-0__00000/000000", "part-1__00000/000000"]
    assert encode(tmp_path / "laion", "--key-prefix", "tar") == keys
    assert encode(f"{tmp_path}/laion/part-*/*.tar", "--key-prefix", "tar", out="again") == keys


def test_equal_keys_in_two_tars(tars: Path, write_tar, picture, refuse):
    """Two tars number their images alike."""
    write_tar(tars / "u.tar", {"0.jpg": picture(7)})
    refuse(1, ["key '0' is in both t-0 and u", "--key-prefix tar"], tars)


def test_a_single_image(tmp_path: Path, picture, refuse):
    """A single image is given."""
    (tmp_path / "a.jpg").write_bytes(picture())
    refuse(2, ["a.jpg is a single image", "folder"], tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz"])
def test_compressed_tars(mapet, tmp_path: Path, picture, encode, monkeypatch, suffix):
    """Compressed tars are unpacked once, into a cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = tar_bytes({f"{seed}.jpg": picture(seed) for seed in range(2)})
    path = tmp_path / f"x{suffix}"
    path.write_bytes(compress(content, suffix))
    assert encode(path) == ["0", "1"]
    mapet("tokenize", "verify", tmp_path / "tokens", "--images", path).ok()
    assert [tar.read_bytes() for tar in (tmp_path / "cache").rglob("*.tar")] == [content]


def test_zstandard_is_not_installed(tmp_path: Path, refuse, monkeypatch):
    """A .tar.zst, and the package zstandard is not installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "x.tar.zst").write_bytes(b"-")
    refuse(2, ["x.tar.zst needs a library", "pip install zstandard"], tmp_path / "x.tar.zst")


def compress(content: bytes, suffix: str) -> bytes:
    import bz2
    import lzma

    if suffix == ".tar.zst":
        return pytest.importorskip("zstandard").compress(content)
    return {".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}.get(suffix, gzip.compress)(content)


def test_a_cut_archive(tmp_path: Path, picture, refuse, monkeypatch):
    """A .tar.gz was cut while it was downloaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar_bytes({"a.jpg": picture()}))[:-50])
    refuse(1, ["x.tar.gz cannot be unpacked", "download it again"], tmp_path / "x.tar.gz")
    assert not list((tmp_path / "cache").rglob("*.tar"))


# Formats


FORMATS = {
    "jpe": "JPEG",
    "jfif": "JPEG",
    "pjpeg": "JPEG",
    "image": "PNG",
    "img": "JPEG",
    "bmp": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "tiff": "TIFF",
    "avif": "AVIF",
    "jp2": "JPEG2000",
}


def test_other_formats_in_a_tar(tmp_path: Path, write_tar, picture, encode):
    """A tar holds images of every format that Pillow decodes."""
    files = {f"{name}.{name}": picture(0, format) for name, format in FORMATS.items()}
    assert encode(write_tar(tmp_path / "x.tar", files)) == sorted(FORMATS)


def test_other_formats_in_a_folder(tmp_path: Path, write_folder, picture, encode):
    """.jfif and others lie beside .jpg."""
    files = {f"{name}.{name}": picture(0, format) for name, format in {**FORMATS, "jpg": "JPEG"}.items()}
    assert encode(write_folder(tmp_path / "x", files)) == sorted([*FORMATS, "jpg"])


def test_most_pixels(tmp_path: Path, write_tar, picture, encode, refuse):
    """--max-pixels refuses images with more pixels."""
    tar = write_tar(tmp_path / "x.tar", {"a.jpg": picture(0, "JPEG", 64, 64), "b.jpg": picture(1, "JPEG", 32, 32)})
    refuse(1, ["64x64 pixels, more than 2,000", "--max-pixels"], tar, "--max-pixels", 2000)
    assert encode(tar, "--max-pixels", 2000, "--on-error", "skip", out="rest") == ["b"]


def test_a_huge_scan(mapet, lab, tmp_path: Path, write_tar, picture, encode, refuse):
    """A scan beyond Pillow's limit is read with --max-pixels, and verified without being told again."""
    buffer = io.BytesIO()
    Image.new("L", (13_500, 13_500), 128).save(buffer, "PNG", compress_level=1)
    tar = write_tar(tmp_path / "x.tar", {"scan.png": buffer.getvalue()})
    refuse(1, ["13500x13500 pixels, more than 178,956,970", "--max-pixels"], tar)
    shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
    assert encode(tar, "--max-pixels", 200_000_000) == ["scan"]
    assert entries_of(tmp_path / "tokens")[0]["source"]["options"] == {"max_pixels": 200_000_000}


# Remote


SIGNATURE = "X-Amz-Signature=0123456789abcdef"


def test_a_presigned_url(mapet, lab, tmp_path: Path, tars: Path, served: str):
    """A presigned URL is read; its signature enters no file and no message."""
    out = tmp_path / "tokens"
    words = [f"{served}/data/t-0.tar?{SIGNATURE}", "--codebook", lab.codebook, "--out", out]
    outcome = mapet("tokenize", "encode-shards", *words).ok()
    assert keys_of(out) == ["0"]
    assert SIGNATURE not in outcome.text
    assert [path for path in out.rglob("*") if path.is_file() and SIGNATURE.encode() in path.read_bytes()] == []


def test_pretraining_from_a_presigned_url(mapet, lab, tmp_path: Path, served: str):
    """Pre-training reads a presigned URL; its signature does not enter the run."""
    shutil.copy(lab.images / "drawings-000000.tar", tmp_path)
    out = tmp_path / "run"
    words = ["--images", f"{served}/drawings-000000.tar?{SIGNATURE}", "--tokens", lab.tokens, "--out", out]
    outcome = mapet("train", "pretrain", *words, *lab.settings, "--set", "data.shuffle=shards").ok()
    assert SIGNATURE not in outcome.text
    files = [path for path in out.rglob("*") if path.is_file()]
    assert [path for path in files if SIGNATURE.encode() in path.read_bytes()] == []


def test_a_presigned_url_that_fails(mapet, lab, tmp_path: Path, served: str):
    """A presigned URL has expired: the message does not show the signature."""
    words = [f"{served}/gone.tar?{SIGNATURE}", "--codebook", lab.codebook, "--out", tmp_path / "t"]
    outcome = mapet("tokenize", "encode-shards", *words)
    outcome.refused(1, "gone.tar does not exist")
    assert SIGNATURE not in outcome.text


def test_a_remote_compressed_tar(tmp_path: Path, picture, served: str, encode):
    """A .tar.gz on a server."""
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(tar_bytes({"a.jpg": picture()})))
    assert encode(f"{served}/x.tar.gz") == ["a"]


def test_hugging_face(mapet, lab, tmp_path: Path):
    """hf:// offline: one sentence."""
    words = ["hf://datasets/someone/something/t-{0..1}.tar", "--codebook", lab.codebook, "--out", tmp_path / "t"]
    outcome = mapet("tokenize", "encode-shards", *words, HF_HUB_OFFLINE="1", process=True)
    assert "Traceback" not in outcome.stderr
    assert outcome.exit_code in (1, 2)
    assert "hf://datasets/someone/something/t-0.tar" in outcome.sentence
