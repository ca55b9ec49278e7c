"""Images in: keys as WebDataset makes them, upright RGB from every kind of file, and errors that name the file."""

import io
import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mapet.shared.errors import DataError, UsageError
from mapet.shared.images import decode, read_bytes, read_image
from mapet.shared.sources import FOLDER_SHARD_IMAGES, open_source, read_records
from PIL import Image, ImageOps

ORIENTATION = 0x0112


def picture(seed: int = 0, width: int = 20, height: int = 12) -> Image.Image:
    """A smooth random picture, so that lossy codecs change it by little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def make_tar(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def make_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def read_with_webdataset(path: Path) -> dict[str, dict]:
    samples = webdataset.WebDataset([str(path)], shardshuffle=False, empty_check=False)
    return {sample["__key__"]: sample for sample in samples}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def largest_difference(image: Image.Image, expected: Image.Image) -> float:
    assert image.mode == "RGB"
    assert image.size == expected.size
    return np.abs(pixels(image) - pixels(expected.convert("RGB"))).max()


# Decoding


def test_rgb_png_decodes_to_its_own_pixels():
    assert largest_difference(decode(encoded(picture()), "x"), picture()) == 0


def test_grey_decodes_to_three_equal_channels():
    grey = picture().convert("L")
    assert largest_difference(decode(encoded(grey), "x"), grey) == 0


def test_palette_decodes_to_its_colours():
    palette = picture().quantize(16)
    assert largest_difference(decode(encoded(palette), "x"), palette) == 0


def test_palette_with_transparency_decodes_to_its_colours_without_alpha():
    palette = picture().quantize(16)
    data = encoded(palette, transparency=bytes([0, 128, *[255] * 14]))
    assert "transparency" in Image.open(io.BytesIO(data)).info
    assert largest_difference(decode(data, "x"), palette) == 0


def test_alpha_is_dropped_and_not_blended():
    colours = picture()
    transparent = colours.copy()
    transparent.putalpha(picture(1).convert("L"))
    assert largest_difference(decode(encoded(transparent), "x"), colours) == 0


def test_cmyk_jpeg_decodes_to_its_colours():
    data = encoded(picture().convert("CMYK"), "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert largest_difference(decode(data, "x"), picture()) < 16


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 20 * 12).astype(np.uint16).reshape(12, 20)
    image = decode(encoded(Image.fromarray(values)), "x")
    assert np.array_equal(pixels(image)[..., 0], values // 256)
    assert len(np.unique(pixels(image))) > 200


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, format: str):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(picture(), format, exif=exif)
    image = decode(data, "x")
    assert image.size == ((20, 12) if orientation < 5 else (12, 20))
    assert largest_difference(image, ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) == 0


def test_orientation_is_applied_even_where_the_rest_of_exif_is_not_valid():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010E] = "a description"
    data = encoded(picture(), "JPEG", exif=exif)
    # The description's tag becomes that of the width: text in a number's place can be read, but not be written back.
    assert data.count(b"\x01\x0e\x00\x02") == 1
    broken = data.replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02")
    assert decode(broken, "x").size == (12, 20)


def test_webp_decodes_close_to_the_original():
    assert largest_difference(decode(encoded(picture(), "WEBP", lossless=True), "x"), picture()) == 0


def test_the_first_frame_of_an_animation_is_taken():
    data = encoded(picture(0), "WEBP", save_all=True, append_images=[picture(1)], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert largest_difference(decode(data, "x"), picture(0)) == 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_an_error_that_names_it(format: str):
    data = encoded(picture(0, 200, 160), format)
    with pytest.raises(DataError, match="dog"):
        decode(data[: len(data) // 2], "dog")


@pytest.mark.parametrize("data", [b"", b"not an image", b"GIF89a" + bytes(40), encoded(picture(), "BMP")])
def test_what_is_no_supported_image_is_an_error_that_names_it(data: bytes):
    with pytest.raises(DataError, match="cat is no JPEG, PNG or WebP"):
        decode(data, "cat")


EXIF = Image.Exif()
EXIF[ORIENTATION], EXIF[0x010E] = 6, "a description"
SOUND = [
    encoded(picture(), "JPEG", exif=EXIF),
    encoded(picture(), "WEBP", exif=EXIF),
    encoded(picture().quantize(8), "PNG", exif=EXIF),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SOUND), st.integers(0, 400), st.integers(0, 255), st.booleans())
def test_damaged_bytes_give_an_image_or_a_data_error(data: bytes, at: int, value: int, cut: bool):
    at = min(at, len(data) - 1)
    damaged = data[:at] + (b"" if cut else bytes([value]) + data[at + 1 :])
    try:
        assert decode(damaged, "x").mode == "RGB"
    except DataError as error:
        assert str(error).startswith("x ")  # noqa: PT017 - either outcome is right


# Keys and labels

NAMES = [
    "plain.jpg",
    "dir/plain.jpg",
    "dir/sub/deep.jpg",
    "dir.v1/dotted.jpg",
    "./here.jpg",
    "two.dots.jpg",
    "space in name.png",
    "größe.webp",
    "UPPER.JPG",
    "dir/same.jpeg",
    "other/same.jpeg",
]


@pytest.fixture
def keyed_tar(tmp_path: Path) -> Path:
    files = {}
    for number, name in enumerate(NAMES):
        format = {"png": "PNG", "webp": "WEBP"}.get(name.rpartition(".")[2], "JPEG")
        files[name] = encoded(picture(number), format)
        if number % 2:
            files[name.rpartition(".")[0] + ".cls"] = f"{number}\n".encode()
    return make_tar(tmp_path / "keys.tar", files)


def test_keys_are_those_of_webdataset(keyed_tar: Path):
    (shard,) = open_source(keyed_tar)
    assert [record.key for record in shard.index()] == list(read_with_webdataset(keyed_tar))


def test_bytes_are_those_of_webdataset(keyed_tar: Path):
    samples = read_with_webdataset(keyed_tar)
    for record in open_source(keyed_tar)[0].index():
        sample = samples[record.key]
        expected = [value for name, value in sample.items() if name.endswith(("jpg", "jpeg", "png", "webp"))]
        assert [read_bytes(record)] == expected


def test_hidden_files_are_no_images(tmp_path: Path):
    # macOS's tar puts "._NAME" beside every NAME; WebDataset ignores them.
    files = {"._a.jpg": b"finder", "a.jpg": encoded(picture(), "JPEG"), "._a.cls": b"finder"}
    tar = make_tar(tmp_path / "x.tar", files)
    assert list(read_with_webdataset(tar)) == ["a"]
    assert [record.key for record in open_source(tar)[0].index()] == ["a"]
    folder = make_folder(tmp_path / "folder", {**files, "d/._b.jpg": b"finder"})
    assert [record.key for record in open_source(folder)[0].index()] == ["a"]


def test_labels_come_from_cls_files(keyed_tar: Path):
    samples = read_with_webdataset(keyed_tar)
    labels = {record.key: record.label for record in open_source(keyed_tar)[0].index()}
    for key, sample in samples.items():
        cls = [value for name, value in sample.items() if name.endswith("cls")]
        assert labels[key] == (int(cls[0]) if cls else None)
    assert any(label is not None for label in labels.values())


def test_a_label_may_stand_before_its_image(tmp_path: Path):
    tar = make_tar(tmp_path / "x.tar", {"a.cls": b"7", "a.png": encoded(picture())})
    assert open_source(tar)[0].index()[0].label == 7


def test_labels_come_from_class_folders_in_sorted_order(tmp_path: Path):
    data = encoded(picture())
    root = make_folder(tmp_path / "f", {"dog/1.png": data, "cat/1.png": data, "ant/x/2.png": data})
    (shard,) = open_source(root)
    assert {record.key: record.label for record in shard.index()} == {"ant/x/2": 0, "cat/1": 1, "dog/1": 2}


def test_a_flat_folder_has_no_labels(tmp_path: Path):
    data = encoded(picture())
    root = make_folder(tmp_path / "f", {"b.png": data, "a.png": data, "cat/c.png": data, "notes.txt": b"-"})
    (shard,) = open_source(root)
    assert [(record.key, record.label) for record in shard.index()] == [
        ("a", None),
        ("b", None),
        ("cat/c", None),
    ]


def test_a_folder_is_split_into_shards_of_sorted_keys(tmp_path: Path):
    data = encoded(picture())
    count = FOLDER_SHARD_IMAGES + 3
    root = make_folder(tmp_path / "f", {f"{number % 7}/{number}.png": data for number in range(count)})
    shards = open_source(root)
    assert [(shard.name, len(shard.index())) for shard in shards] == [
        ("folder-000000", 1000),
        ("folder-000001", 3),
    ]
    keys = [record.key for shard in shards for record in shard.index()]
    assert keys == sorted(f"{number % 7}/{number}" for number in range(count))
    assert not shards[0].is_tar
    assert shards[1].size() == 3 * len(data)


def test_a_folders_digest_depends_on_names_and_bytes(tmp_path: Path):
    roots = [
        make_folder(tmp_path / "0", {"a.png": SOUND[2], "b.png": SOUND[0]}),
        make_folder(tmp_path / "1", {"a.png": SOUND[2], "b.png": SOUND[0]}),
        make_folder(tmp_path / "2", {"a.png": SOUND[2], "c.png": SOUND[0]}),
        make_folder(tmp_path / "3", {"a.png": SOUND[2], "b.png": SOUND[1]}),
    ]
    digests = [open_source(root)[0].sha256() for root in roots]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# Ways to name a source


@pytest.fixture
def tars(tmp_path: Path) -> list[Path]:
    (tmp_path / "tars").mkdir()
    return [
        make_tar(
            tmp_path / f"tars/t-{number:02d}.tar",
            {f"{number}-{n}.png": encoded(picture(n)) for n in range(2)},
        )
        for number in range(3)
    ]


def names_and_keys(source) -> list[tuple[str, list[str]]]:
    return [(shard.name, [record.key for record in shard.index()]) for shard in open_source(source)]


def test_a_pattern_a_directory_and_a_list_name_the_same_tars(tars: list[Path]):
    expected = [(f"t-{number:02d}", [f"{number}-0", f"{number}-1"]) for number in range(3)]
    assert names_and_keys(f"{tars[0].parent}/t-{{00..02}}.tar") == expected
    assert names_and_keys(tars[0].parent) == expected
    assert names_and_keys(tars) == expected
    assert names_and_keys([str(tar) for tar in tars]) == expected
    assert names_and_keys(tars[1]) == expected[1:2]
    assert all(shard.is_tar and shard.size() == shard.root.stat().st_size for shard in open_source(tars))


def test_a_pattern_with_a_missing_tar_is_an_error_that_names_it(tars: list[Path]):
    with pytest.raises(DataError, match=r"t-03\.tar does not exist"):
        open_source(f"{tars[0].parent}/t-{{00..03}}.tar")


def test_an_unbalanced_pattern_is_a_usage_error(tars: list[Path]):
    with pytest.raises(UsageError, match=r"00\.\.02"):
        open_source(f"{tars[0].parent}/t-{{00..02.tar")


def test_no_images_at_all_is_a_usage_error():
    with pytest.raises(UsageError, match="No images"):
        open_source([])


def test_a_folder_among_tars_is_a_usage_error(tars: list[Path]):
    with pytest.raises(UsageError, match="is a folder"):
        open_source([tars[0], tars[0].parent])


# What is wrong on disk


def test_a_missing_path_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


def test_a_tar_of_no_bytes_is_an_error_that_names_it(tmp_path: Path):
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match=r"empty\.tar is empty \(0 bytes\)"):
        read_records(tmp_path / "empty.tar")


def test_a_tar_without_images_is_an_error_that_names_it(tmp_path: Path):
    tar = make_tar(tmp_path / "texts.tar", {"a.txt": b"x", "a.cls": b"1"})
    with pytest.raises(DataError, match=r"texts\.tar holds no images"):
        read_records(tar)


def test_an_empty_folder_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(DataError, match=f"{tmp_path} holds neither"):
        read_records(tmp_path)


@pytest.mark.parametrize("name", ["zip.tar", "gz.tar"])
def test_what_is_no_plain_tar_is_an_error_that_names_it(tmp_path: Path, name: str):
    if name == "zip.tar":
        (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(2000))
    else:
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            tar.add(__file__, "a.jpg")
    with pytest.raises(DataError, match=name):
        read_records(tmp_path / name)


@pytest.fixture(scope="module")
def three_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[int]]:
    """A folder to write in, a tar's bytes, and where its three members begin and the last one ends."""
    folder = tmp_path_factory.mktemp("cut")
    tar = make_tar(folder / "whole.tar", {f"{name}.png": encoded(picture(0, 60, 40)) for name in "abc"})
    records = open_source(tar)[0].index()
    ends = records[-1].offset + -(-records[-1].length // 512) * 512
    return folder, tar.read_bytes(), [*(record.offset - 512 for record in records), ends]


@pytest.mark.parametrize(("member", "beyond"), [*itertools.product([1, 2], [0, 1, 511, 512, 700]), (3, 0), (3, -600)])
def test_a_tar_cut_anywhere_is_an_error_that_names_it(three_images, member: int, beyond: int):
    folder, data, starts = three_images
    cut = folder / "cut.tar"
    cut.write_bytes(data[: starts[member] + beyond])
    with pytest.raises(DataError, match=r"cut\.tar"):
        read_records(cut)


def test_a_damaged_header_does_not_lose_images_silently(three_images):
    folder, data, starts = three_images
    damaged = bytearray(data)
    damaged[starts[1] + 150] ^= 1  # in the checksum of the second header
    (folder / "damaged.tar").write_bytes(damaged)
    with pytest.raises(DataError, match=r"damaged\.tar"):
        read_records(folder / "damaged.tar")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.integers(0, 2), at=st.integers(0, 511), value=st.integers(0, 255))
def test_a_changed_header_byte_never_ends_in_another_error(three_images, header: int, at: int, value: int):
    folder, data, starts = three_images
    damaged = bytearray(data)
    damaged[starts[header] + at] = value
    (folder / "fuzz.tar").write_bytes(damaged)
    try:
        (shard,) = open_source(folder / "fuzz.tar")
        records = shard.index()
    except DataError as error:
        assert "fuzz.tar" in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert len(records) == 3


def test_a_key_twice_in_a_tar_is_an_error_that_names_both(tmp_path: Path):
    data = encoded(picture())
    tar = make_tar(tmp_path / "twice.tar", [("a.png", data), ("b.png", data), ("a.png", data)])
    with pytest.raises(DataError, match=r"twice\.tar holds key 'a' twice"):
        read_records(tar)


def test_a_key_twice_across_tars_is_an_error_that_names_all(tmp_path: Path):
    data = encoded(picture())
    paths = [make_tar(tmp_path / f"{name}.tar", {"k/a.png": data}) for name in ("first", "second")]
    with pytest.raises(DataError, match="'k/a' is in both first and second"):
        read_records(paths)


def test_a_key_twice_in_a_folder_is_an_error_that_names_both(tmp_path: Path):
    make_folder(tmp_path, {"a.png": b"-", "a.jpg": b"-"})
    with pytest.raises(DataError, match=r"a\.jpg and a\.png, which have the same key 'a'"):
        read_records(tmp_path)


def test_two_tars_of_one_base_name_are_an_error(tmp_path: Path):
    for side in ("l", "r"):
        (tmp_path / side).mkdir()
        make_tar(tmp_path / side / "same.tar", {f"{side}.png": encoded(picture())})
    with pytest.raises(DataError, match="same base name"):
        read_records([tmp_path / "l/same.tar", tmp_path / "r/same.tar"])


@pytest.mark.parametrize("text", [b"cat", b"", b"1.5", b"\xff\xfe", b"1 2"])
def test_a_label_that_is_no_integer_is_an_error_that_names_it(tmp_path: Path, text: bytes):
    tar = make_tar(tmp_path / "x.tar", {"a.png": encoded(picture()), "a.cls": text})
    with pytest.raises(DataError, match=r"x\.tar holds .* in a\.cls, not a class number"):
        read_records(tar)


def test_an_undecodable_image_in_a_tar_is_an_error_that_names_tar_and_key(tmp_path: Path):
    tar = make_tar(tmp_path / "x.tar", {"dir/bad.jpg": b"not a picture"})
    with pytest.raises(DataError, match=r"x\.tar: image 'dir/bad'"):
        read_image(open_source(tar)[0].index()[0])


def test_a_dangling_link_in_a_folder_is_an_error_that_names_it(tmp_path: Path):
    make_folder(tmp_path, {"a.png": encoded(picture())})
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        read_records(tmp_path)


def test_a_tar_that_shrank_after_listing_is_an_error_that_names_it(three_images):
    folder, data, _ = three_images
    tar = folder / "shrinking.tar"
    tar.write_bytes(data)
    records = open_source(tar)[0].index()
    os.truncate(tar, records[1].offset + 10)
    assert read_bytes(records[0])
    for record in records[1:]:
        with pytest.raises(DataError, match=rf"shrinking\.tar ends inside the image of key '{record.key}'"):
            read_bytes(record)


def test_a_tar_that_vanished_after_listing_is_an_error_that_names_it(three_images):
    folder, data, _ = three_images
    (folder / "vanishing.tar").write_bytes(data)
    record = open_source(folder / "vanishing.tar")[0].index()[0]
    (folder / "vanishing.tar").unlink()
    with pytest.raises(DataError, match=r"vanishing\.tar cannot be read"):
        read_bytes(record)


def test_a_tar_replaced_by_another_file_is_read_anew(tmp_path: Path):
    tar = make_tar(tmp_path / "x.tar", {"a.png": encoded(picture(0))})
    read_image(open_source(tar)[0].index()[0])
    os.replace(make_tar(tmp_path / "new.tar", {"a.png": encoded(picture(1))}), tar)
    image, _ = read_image(open_source(tar)[0].index()[0])
    assert largest_difference(image, picture(1)) == 0


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "plain.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(tmp_path)
