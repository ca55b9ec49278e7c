"""Hostile inputs: by default a command stops with one sentence that names the file; told to skip, it lists what it
left out and encodes everything else. Nothing is ever silently missing."""

import io
import os
import resource
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mapet.shared.errors import DataError
from mapet.shared.images.decode import decode
from mapet.shared.tokens.store import TokenStore
from mapet.tokenize_stage.encode_shards import encode_shards
from mapet.tokenize_stage.inspect import inspect, show
from mapet.tokenize_stage.verify import verify
from mapet.train_stage.data.join import join
from PIL import Image

from ...warm import warm_python

ORIENTATION = 0x0112


def picture(seed: int = 0, width: int = 90, height: int = 70) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG of `width` x `height` black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(width // 8 + 1) * 100))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x010E] = orientation, "a description"
    return exif


def hostile_images() -> dict[str, tuple[str, bytes, str | None]]:
    """Name of the file, its bytes and what is said of it (None: it is encoded as usual), by kind."""
    sixteen = np.linspace(0, 65535, 90 * 70).astype(np.uint16).reshape(70, 90)
    alpha = picture(4)
    alpha.putalpha(picture(5).convert("L"))
    rotated = encoded(picture(6), exif=turned(6))
    frames = {"save_all": True, "append_images": [picture(8), picture(9)]}
    return {
        "truncated JPEG": ("cut.jpg", encoded(picture())[:1000], "cannot be decoded (image file is truncated"),
        "truncated PNG": ("cutpng.png", encoded(picture(), "PNG")[:3000], "cannot be decoded"),
        "truncated WebP": ("cutwebp.webp", encoded(picture(), "WEBP")[:200], "cannot be decoded"),
        "zero bytes": (
            "nothing.jpg",
            b"",
            "is not an image of a format that is read, such as JPEG",
        ),
        "no image": (
            "text.jpg",
            b"this is a text" * 20,
            "such as JPEG, PNG or WebP (280 bytes)",
        ),
        "HEIC by name": ("named.heic", b"heic", "holds 'named.heic', which is not one of"),
        "TIFF of floats": ("floats.tif", encoded(picture().convert("F"), "TIFF"), "its pixels are 32-bit floats"),
        "renamed GIF": ("gif.jpg", encoded(picture(), "GIF"), None),
        "renamed TIFF": ("tiff.png", encoded(picture(), "TIFF"), None),
        "GIF by name": ("animated.gif", encoded(picture(), "GIF", **frames), None),
        "decompression bomb": ("bomb.png", bomb(60_000, 60_000), "is 60000x60000 pixels, more than 178,956,970"),
        "a line of pixels": ("line.png", encoded(Image.new("L", (60_000, 1)), "PNG"), "is 60000x1 pixels, too long"),
        "renamed PNG": ("png.jpg", encoded(picture(1), "PNG"), None),
        "renamed WebP": ("webp.jpeg", encoded(picture(2), "WEBP"), None),
        "one pixel": ("pixel.png", encoded(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"), None),
        "16-bit grey": ("sixteen.png", encoded(Image.fromarray(sixteen), "PNG"), None),
        "one bit": ("bit.png", encoded(picture(3).convert("1"), "PNG"), None),
        "CMYK": ("cmyk.jpg", encoded(picture(3).convert("CMYK")), None),
        "alpha": ("alpha.png", encoded(alpha, "PNG"), None),
        "palette with alpha": (
            "palette.png",
            encoded(picture(4).quantize(16), "PNG", transparency=bytes([0, 128, *[255] * 14])),
            None,
        ),
        "EXIF-rotated": ("rotated.jpg", rotated, None),
        "damaged EXIF": (
            "exif.jpg",
            rotated.replace(b"\x01\x0e\x00\x02\x00\x00\x00", b"\x01\x0e\x00\x02\x00\xff\x00"),
            None,
        ),
        "animated WebP": ("film.webp", encoded(picture(7), "WEBP", **frames), None),
        "animated PNG": ("filmpng.png", encoded(picture(7), "PNG", **frames), None),
        "extension in capitals": ("CAPITALS.JPG", encoded(picture(10)), None),
    }


IMAGES = hostile_images()
SOUND = {kind: (name, data) for kind, (name, data, said) in IMAGES.items() if said is None}
UNSOUND = {kind: case for kind, case in IMAGES.items() if case[2] is not None}
GOOD = encoded(picture(20)), encoded(picture(21)), encoded(picture(22))


def stem(name: str) -> str:
    return name.partition(".")[0]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def pack(path: Path, *members: tuple[str, bytes], **more) -> Path:
    """A tar of `a.jpg`, the members and `z.jpg`."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in (("a.jpg", GOOD[0]), *members, ("z.jpg", GOOD[1])):
            add(tar, name, data, **(more if name.startswith("link") else {}))
    return path


def cut(path: Path, end: int) -> Path:
    os.truncate(path, end)
    return path


def padded(path: Path, data: bytes) -> Path:
    with open(path, "ab") as file:
        file.write(data)
    return path


def folder(path: Path, make: Callable[[Path], object]) -> Path:
    path.mkdir()
    for name, data in (("a.jpg", GOOD[0]), ("z.jpg", GOOD[1])):
        (path / name).write_bytes(data)
    make(path)
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def round_about(path: Path) -> None:
    (path / "sub").mkdir()
    (path / "sub" / "round").symlink_to("..")


@dataclass(frozen=True)
class HostileSource:
    """How a source is made under a folder, what is said by default (None: nothing), the keys that are encoded with
    --on-error skip, and those that are listed."""

    make: Callable[[Path], Path]
    said: str | None
    encoded: str
    skipped: tuple[str, ...] = ()


SOURCES = {
    "truncated tar": HostileSource(
        lambda f: cut(pack(f / "x.tar", ("b.jpg", GOOD[2])), 2000 + len(GOOD[0])), "x.tar is truncated", "a", ("b",)
    ),
    "tar cut in a header": HostileSource(
        lambda f: cut(pack(f / "x.tar"), 512 + -(-len(GOOD[0]) // 512) * 512 + 100), "x.tar is truncated", "a", ("",)
    ),
    "empty tar": HostileSource(lambda f: written(f / "x.tar", b""), "x.tar is empty (0 bytes)", "", ("",)),
    "no tar": HostileSource(lambda f: written(f / "x.tar", b"PK" * 999), "x.tar is not a readable tar", "", ("",)),
    "tar without images": HostileSource(
        lambda f: written(f / "x.tar", bytes(10240)), "x.tar holds no images", "", ("",)
    ),
    "tar padded with zeros": HostileSource(lambda f: padded(pack(f / "x.tar"), bytes(99_999)), None, "az"),
    "tar padded with junk": HostileSource(
        lambda f: padded(pack(f / "x.tar"), b"junk" * 99), "x.tar goes on after its end", "az", ("",)
    ),
    "two tars in one": HostileSource(
        lambda f: padded(pack(f / "x.tar"), pack(f / "y", ("b.jpg", GOOD[2])).read_bytes()),
        "x.tar goes on after its end",
        "az",
        ("",),
    ),
    "absolute name": HostileSource(
        lambda f: pack(f / "x.tar", ("/etc/b.jpg", GOOD[2])), "x.tar holds '/etc/b.jpg', a name", "az", ("/etc/b",)
    ),
    "name with ..": HostileSource(
        lambda f: pack(f / "x.tar", ("../b.jpg", GOOD[2])), "x.tar holds '../b.jpg', a name", "az", ("../b",)
    ),
    "name not UTF-8": HostileSource(
        lambda f: pack(f / "x.tar", ("b\udcff.jpg", GOOD[2])), r"x.tar holds 'b\udcff.jpg'", "az", ("b\\udcff",)
    ),
    "link in a tar": HostileSource(
        lambda f: pack(f / "x.tar", ("link.jpg", b""), type=tarfile.LNKTYPE, linkname="a.jpg"),
        "x.tar holds 'link.jpg', a link to 'a.jpg'",
        "az",
        ("link",),
    ),
    "duplicate key in a tar": HostileSource(
        lambda f: pack(f / "x.tar", ("a.png", GOOD[2])), "x.tar holds 'a.jpg' and 'a.png', which have", "z", ("a",)
    ),
    "label that is not text": HostileSource(
        lambda f: pack(f / "x.tar", ("b.jpg", GOOD[2]), ("b.cls", b"\xff\xfe")),
        "x.tar has an unreadable label b'\\xff\\xfe' in 'b.cls' (not UTF-8)",
        "abz",
        (),
    ),
    "duplicate key in a folder": HostileSource(
        lambda f: folder(f / "x", lambda x: written(x / "a.png", GOOD[2])),
        "x holds 'a.jpg' and 'a.png', which have the same key 'a'",
        "z",
        ("a",),
    ),
    "link to nowhere": HostileSource(
        lambda f: folder(f / "x", lambda x: (x / "b.jpg").symlink_to("nowhere")),
        "x holds 'b.jpg', a link to nowhere",
        "az",
        ("b",),
    ),
    "pipe in a folder": HostileSource(
        lambda f: folder(f / "x", lambda x: os.mkfifo(x / "b.jpg")),
        "x holds 'b.jpg', which is not a regular",
        "az",
        ("b",),
    ),
    "folder in a circle": HostileSource(
        lambda f: folder(f / "x", round_about), "x holds 'sub/round/', a link to a folder", "az", ("sub/round/",)
    ),
}


def files_of(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def keys_of(store: TokenStore) -> list[str]:
    return [key for _, rows in store.shards() for key in rows.keys]


def expect_stop(images: Path, codebook: Path, out: Path, *words: str) -> None:
    """One sentence with these words, and nothing half written."""
    with pytest.raises(DataError) as caught:
        encode_shards(images, codebook, out, batch_size=4)
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert set(files_of(out)) <= {"codebook.json"}


def expect_listed(images: Path, codebook: Path, out: Path, found: list[str], skipped: list[str]) -> TokenStore:
    """With on_error="skip" all of `found` are encoded and all of `skipped` listed, and the store is sound."""
    store = encode_shards(images, codebook, out, batch_size=4, on_error="skip")
    assert (keys_of(store), [key for _, key, _ in store.skipped()]) == (found, skipped)
    assert len(store) == len(found)
    for _, _, reason in store.skipped():
        assert reason
        assert not any(str(path) in reason for path in (images, images.parent, "/tmp", "mapet-"))
    assert verify(out, codebook=codebook, images=str(images)) == len(found)
    show(inspect(out))
    return store


@pytest.mark.parametrize("kind", UNSOUND)
def test_by_default_a_hostile_image_stops_the_command(chain, tmp_path: Path, kind: str):
    name, data, said = UNSOUND[kind]
    tar = pack(tmp_path / "x.tar", (name, data))
    expect_stop(tar, chain.codebook, tmp_path / "out", str(tar), stem(name), said)


def test_hostile_images_are_skipped_listed_and_nothing_else_is_missing(chain, tmp_path: Path):
    tar = pack(tmp_path / "x.tar", *((name, data) for name, data, _ in IMAGES.values()))
    found = ["a", *(stem(name) for name, _ in SOUND.values()), "z"]
    listed = [stem(name) for name, _, _ in UNSOUND.values()]
    listed.sort(key=lambda key: key != "named")  # what headers say comes first
    store = expect_listed(tar, chain.codebook, tmp_path / "out", found, listed)
    assert len(store) + len(store.skipped()) == len(IMAGES) + 2
    reasons = {key: reason for _, key, reason in store.skipped()}
    assert [kind for kind, (name, _, said) in UNSOUND.items() if said not in reasons[stem(name)]] == []
    assert store.skipped()[1][2].startswith("x.tar: image 'cut' cannot be decoded")


def test_what_is_skipped_is_the_same_bytes_everywhere(chain, tmp_path: Path):
    members = [(name, data) for name, data, _ in IMAGES.values()]
    (tmp_path / "elsewhere").mkdir()
    for place, workers in (("x.tar", 0), ("elsewhere/x.tar", 2)):
        tar = pack(tmp_path / place, *members)
        out = tmp_path / f"out{workers}"
        encode_shards(tar, chain.codebook, out, batch_size=4, workers=workers, on_error="skip")
    assert files_of(tmp_path / "out0") == files_of(tmp_path / "out2")


def test_odd_images_have_the_tokens_of_the_picture_they_show(chain, tmp_path: Path):
    """Each beside a plain PNG of the same pixels: the same crop, the same tokens."""
    plain = [(f"plain-{stem(name)}.png", encoded(decode(data, name), "PNG")) for name, data in SOUND.values()]
    tar = pack(tmp_path / "x.tar", *SOUND.values(), *plain)
    ((_, rows),) = encode_shards(tar, chain.codebook, tmp_path / "out", batch_size=4).shards()
    place = {key: at for at, key in enumerate(rows.keys)}
    for name, _ in SOUND.values():
        odd, same = place[stem(name)], place[f"plain-{stem(name)}"]
        assert np.array_equal(rows.tokens[odd], rows.tokens[same]), name
        assert np.array_equal(rows.crops[odd], rows.crops[same]), name
    assert rows.sizes[place["rotated"]].tolist() == [90, 70]
    assert rows.sizes[place["pixel"]].tolist() == [1, 1]


@pytest.mark.parametrize("kind", [kind for kind, case in SOURCES.items() if case.said])
def test_by_default_a_hostile_source_stops_the_command(chain, tmp_path: Path, kind: str):
    expect_stop(SOURCES[kind].make(tmp_path), chain.codebook, tmp_path / "out", SOURCES[kind].said)


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_sound_in_a_hostile_source_is_encoded_and_the_rest_listed(chain, tmp_path: Path, kind: str):
    case = SOURCES[kind]
    images = case.make(tmp_path)
    if not case.encoded:  # a store that would hold nothing is an error, and nothing is written
        with pytest.raises(DataError, match=r"None of the images can be used, the first: .*x\.tar") as caught:
            encode_shards(images, chain.codebook, tmp_path / "out", on_error="skip")
        assert case.said.removeprefix("x.tar ") in str(caught.value)
        assert not (tmp_path / "out").exists()
        return
    expect_listed(images, chain.codebook, tmp_path / "out", list(case.encoded), list(case.skipped))
    if case.said is None:
        encode_shards(images, chain.codebook, tmp_path / "stop", batch_size=4)
        assert files_of(tmp_path / "stop") == files_of(tmp_path / "out")


def test_a_key_in_two_tars_is_refused_whatever_is_to_be_skipped(chain, tmp_path: Path):
    for name in ("x", "y"):
        pack(tmp_path / f"{name}.tar")
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match="key 'a' is in both x and y"):
            encode_shards(tmp_path, chain.codebook, tmp_path / "out", on_error=on_error)
        assert not (tmp_path / "out").exists()


def test_an_empty_shard_among_others_is_no_trouble(chain, tmp_path: Path):
    (tmp_path / "tars").mkdir()
    pack(tmp_path / "tars" / "good.tar", ("a.cls", b"0"))
    with tarfile.open(tmp_path / "tars" / "bad.tar", "w") as tar:
        add(tar, "bad.jpg", b"no image")
    (tmp_path / "tars" / "nothing.tar").touch()
    store = expect_listed(tmp_path / "tars", chain.codebook, tmp_path / "out", ["a", "z"], ["bad", ""])
    assert {name: entry["images"] for name, entry in store.entries.items()} == {"bad": 0, "good": 2, "nothing": 0}
    joined = join(str(tmp_path / "tars"), store)
    assert [joined.key(index) for index in range(len(joined))] == ["a", "z"]


ENCODE = """
import sys
from mapet.shared.errors import DataError
from mapet.shared.runtime.console import running_command
from mapet.tokenize_stage.encode_shards import encode_shards
images, codebook, out = sys.argv[1:]
for on_error in ("stop", "skip"):
    try:
        with running_command():
            encode_shards(images, codebook, out, on_error=on_error, workers=1, batch_size=8)
    except DataError as error:
        print(error)
"""


def test_a_closed_file_is_named_or_listed(chain, tmp_path: Path, run_as_owner):
    images, out = folder(tmp_path / "x", lambda x: written(x / "closed.jpg", GOOD[2])), tmp_path / "out"
    os.chmod(images / "closed.jpg", 0)
    ran = run_as_owner(ENCODE, images, chain.codebook, out)
    assert ran.stdout.startswith(f"{images / 'closed.jpg'} cannot be read (Permission denied) for key 'closed'.\n"), (
        ran.stderr
    )
    store = TokenStore(out)
    assert keys_of(store) == ["a", "z"]
    assert [key for _, key, _ in store.skipped()] == ["closed"]
    assert store.skipped()[0][2].startswith("closed.jpg cannot be read (Permission denied)")
    os.chmod(images / "closed.jpg", 0o644)
    with pytest.raises(DataError, match="is not the one that was encoded"):
        verify(out, images=str(images))


def test_nothing_that_pillow_warns_of_is_printed_by_any_process(chain, tmp_path: Path):
    large = encoded(Image.new("1", (1_200, 800)), "PNG")
    members = [(name, data) for name, data, _ in IMAGES.values()]
    arguments = [pack(tmp_path / "x.tar", *members, ("large.png", large)), chain.codebook, tmp_path / "out"]
    code = "from PIL import Image; Image.MAX_IMAGE_PIXELS = 900_000\n" + ENCODE  # Pillow warns of more
    ran = subprocess.run([*warm_python(), "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, 2 * f"{arguments[0]}: took 1 tar (x.tar).\n")
    assert f"{len(UNSOUND)}, the first in x: named: holds 'named.heic'" in ran.stdout


def test_what_is_wrong_with_a_downloaded_tar_names_its_url(chain, tmp_path: Path, served: str):
    cut(pack(tmp_path / "cut.tar", ("b.jpg", GOOD[2])), 2000 + len(GOOD[0]))
    pack(tmp_path / "bad.tar", ("b.jpg", b"no image"))
    for name, words in (
        ("cut", " is truncated inside 'b.jpg'"),
        ("bad", ": image 'b' is not an image of a format that is read"),
    ):
        url = f"{served}/{name}.tar"
        with pytest.raises(DataError) as caught:
            encode_shards(url, chain.codebook, tmp_path / name, batch_size=4)
        assert str(caught.value).startswith(url + words)
        store = encode_shards(url, chain.codebook, tmp_path / name, batch_size=4, on_error="skip")
        assert [key for _, key, _ in store.skipped()] == ["b"]
        assert verify(store.path, images=url) == len(store)
        local = encode_shards(tmp_path / f"{name}.tar", chain.codebook, tmp_path / f"{name}-local", on_error="skip")
        assert files_of(local.path) == files_of(store.path)


# A full disk


def expect_no_room(chain, out: Path, reason: str) -> None:
    """The encoding ends with one sentence; what lies under `out` is whole."""
    with pytest.raises(DataError) as caught:
        encode_shards(chain.images, chain.codebook, out, batch_size=16)
    place, _, said = str(caught.value).partition(" could not be written ")
    assert said == f"({reason}); make room and give the same command again."
    assert Path(place).is_relative_to(out)
    assert files_of(out).items() < files_of(chain.tokens).items()


def test_a_full_disk_ends_an_encoding_in_one_sentence_and_room_ends_it_well(chain, tmp_path: Path):
    disk = tmp_path / "small"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32768", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        expect_no_room(chain, disk / "out", "No space left on device")
        assert len(list((disk / "out/shards").glob("*.zip"))) in (1, 2)
        subprocess.run(["mount", "-o", "remount,size=999999", str(disk)], check=True)
        encode_shards(chain.images, chain.codebook, disk / "out", batch_size=16)
        assert files_of(disk / "out") == files_of(chain.tokens)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_limit_of_file_sizes_ends_an_encoding_in_one_sentence(chain, tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        expect_no_room(chain, tmp_path / "out", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    encode_shards(chain.images, chain.codebook, tmp_path / "out", batch_size=16)
    assert files_of(tmp_path / "out") == files_of(chain.tokens)
