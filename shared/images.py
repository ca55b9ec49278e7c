"""Images in: WebDataset tars or a folder of (class) folders, each image with a stable key, its bytes and its label."""

import hashlib
import io
import os
import struct
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import braceexpand
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import DataError, UsageError
from .files import sha256_file

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FORMATS = ("JPEG", "PNG", "WEBP")
FOLDER_SHARD_IMAGES = 1000
# What makes an image of each EXIF orientation upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """Where one image's bytes lie. `offset` and `length` are in bytes; `label` is None where there is none."""

    key: str
    path: Path
    offset: int
    length: int
    label: int | None


@dataclass(frozen=True, slots=True)
class SourceShard:
    """A unit of work: one tar, or up to 1,000 images of a folder. `root` is the tar, or the folder."""

    name: str
    root: Path
    records: tuple[ImageRecord, ...]

    @property
    def is_tar(self) -> bool:
        return self.root.is_file()

    def size(self) -> int:
        """Bytes of the tar, or of all images of a folder's shard."""
        return self.root.stat().st_size if self.is_tar else sum(record.length for record in self.records)

    def sha256(self) -> str:
        """Digest of the tar's bytes; of a folder's shard, the digest over (relative path, digest) of its files."""
        if self.is_tar:
            return sha256_file(self.root)
        whole = hashlib.sha256()
        for record in self.records:
            whole.update(f"{record.path.relative_to(self.root)}\0{sha256_file(record.path)}\n".encode())
        return whole.hexdigest()


def key_of(name: str) -> str:
    """WebDataset's `__key__`: the path and the base name up to its first dot."""
    directory, _, base = name.rpartition("/")
    stem = base.partition(".")[0]
    return f"{directory}/{stem}" if directory else stem


def open_source(images: str | Path | Sequence[str | Path]) -> list[SourceShard]:
    """Lists every image of a source without decoding any.

    `images` is a tar, a directory with tars, a folder of images or of class folders, a brace pattern such as
    `data/train-{000000..000015}.tar`, or a list of tars. Only headers are read.

    Raises DataError for a path that is missing, a tar that is empty, truncated or without images, and a key that
    stands twice.
    """
    paths = _expand(images)
    if len(paths) == 1 and paths[0].is_dir():
        tars = sorted(paths[0].glob("*.tar"))
        shards = [_index_tar(tar) for tar in tars] if tars else _index_folder(paths[0])
    else:
        shards = [_index_tar(path) for path in paths]
    _refuse_doubles(shards)
    return shards


def keys_sha256(records: Iterable[ImageRecord]) -> str:
    """Digest of a set of images by their keys, whatever their order."""
    return hashlib.sha256("\n".join(sorted(record.key for record in records)).encode()).hexdigest()


def _expand(images: str | Path | Sequence[str | Path]) -> list[Path]:
    patterns = [images] if isinstance(images, str | Path) else list(images)
    if not patterns:
        raise UsageError("No images were given; name a tar, a folder or a brace pattern.")
    try:
        paths = [Path(path) for pattern in patterns for path in braceexpand.braceexpand(str(pattern))]
    except ValueError as error:
        raise UsageError(f"IMAGES {images} is no pattern such as train-{{000..015}}.tar ({error}).") from None
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist; IMAGES takes a tar, a folder or a brace pattern of tars.")
        if path.is_dir() and len(paths) > 1:
            raise UsageError(f"{path} is a folder; give one folder alone, or tars.")
    return paths


def _index_tar(path: Path) -> SourceShard:
    found: dict[str, tarfile.TarInfo] = {}
    classes: dict[str, tarfile.TarInfo] = {}
    for member in _members(path):
        key, extension = key_of(member.name), member.name.rpartition(".")[2].lower()
        if _is_hidden(member.name):
            continue
        if extension in EXTENSIONS:
            if key in found:
                raise DataError(f"{path} holds key {key!r} twice; keys must be unique.")
            found[key] = member
        elif extension == "cls":
            classes[key] = member
    if not found:
        raise DataError(f"{path} holds no images ({', '.join(EXTENSIONS)}); give tars in WebDataset layout.")
    labels = _read_labels(path, classes)
    records = (
        ImageRecord(key, path, member.offset_data, member.size, labels.get(key)) for key, member in found.items()
    )
    return SourceShard(path.name.removesuffix(".tar"), path, tuple(records))


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, from its headers; DataError if it is empty, cut or damaged."""
    whole = path.stat().st_size
    if whole == 0:
        raise DataError(f"{path} is empty (0 bytes); make or download it again.")
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                if member.offset_data + member.size > whole:
                    raise DataError(f"{path} is truncated inside {member.name}; make or download it again.")
                yield member
            end = tar.offset
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} is no readable tar ({error}); give an uncompressed, whole tar.") from None
    with open(path, "rb") as file:
        file.seek(end)
        # tarfile takes a cut or damaged header for the end; a tar really ends with blocks of zeros.
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path} is truncated or damaged at byte {end}; make or download it again.")


def _is_hidden(name: str) -> bool:
    """Such as macOS's `._a.jpg` beside `a.jpg`; WebDataset gives such files no key."""
    return name.rpartition("/")[2].startswith(".")


def _read_labels(path: Path, classes: dict[str, tarfile.TarInfo]) -> dict[str, int]:
    labels = {}
    with open(path, "rb") as file:
        for key, member in classes.items():
            file.seek(member.offset_data)
            text = file.read(member.size)
            try:
                labels[key] = int(text)
            except ValueError:
                raise DataError(f"{path}: {member.name} holds {text[:20]!r}, not a class number.") from None
    return labels


def _index_folder(root: Path) -> list[SourceShard]:
    files = {}
    for directory, _, names in os.walk(root, followlinks=True):
        for name in names:
            if name.rpartition(".")[2].lower() in EXTENSIONS and "." in name and not _is_hidden(name):
                path = Path(directory, name)
                if not path.exists():
                    raise DataError(f"{path} is a link to nowhere; remove it or restore its target.")
                key = key_of(path.relative_to(root).as_posix())
                if key in files:
                    raise DataError(f"{path} and {files[key]} have the same key {key!r}; keys must be unique.")
                files[key] = path
    if not files:
        raise DataError(f"{root} holds neither tars nor images ({', '.join(EXTENSIONS)}).")
    labels = _folder_labels(files)
    keys = sorted(files)
    records = [ImageRecord(key, files[key], 0, files[key].stat().st_size, labels.get(key)) for key in keys]
    blocks = range(0, len(records), FOLDER_SHARD_IMAGES)
    return [
        SourceShard(f"folder-{number:06d}", root, tuple(records[start : start + FOLDER_SHARD_IMAGES]))
        for number, start in enumerate(blocks)
    ]


def _folder_labels(keys: Iterable[str]) -> dict[str, int]:
    """A label for every image if all of them lie in class folders: the folder's rank in sorted order."""
    folders = {key: key.split("/")[0] if "/" in key else None for key in keys}
    if None in folders.values():
        return {}
    number = {name: index for index, name in enumerate(sorted(set(folders.values())))}
    return {key: number[name] for key, name in folders.items()}


def _refuse_doubles(shards: list[SourceShard]) -> None:
    names: dict[str, Path] = {}
    keys: dict[str, str] = {}
    for shard in shards:
        if shard.name in names:
            raise DataError(f"{shard.root} and {names[shard.name]} have the same base name; rename one of them.")
        names[shard.name] = shard.root
        for record in shard.records:
            if any("\ud800" <= character <= "\udfff" for character in record.key):
                raise DataError(f"{shard.root}: the name of {record.key!r} is not UTF-8; rename that file.")
            if record.key in keys:
                raise DataError(
                    f"key {record.key!r} is in both {keys[record.key]} and {shard.name}; keys must be unique."
                )
            keys[record.key] = shard.name


@lru_cache(maxsize=32)
def _descriptor(path: Path, inode: int, process: int) -> "_OpenFile":
    return _OpenFile(path)


class _OpenFile:
    """A descriptor that closes itself when the cache drops it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def read_bytes(record: ImageRecord) -> bytes:
    """The image's encoded bytes. Raises DataError if the file is gone or shorter than when it was listed."""
    try:
        # In the cache's key: the inode, as a tar may be replaced under its name; the process, as forked workers
        # must not share a descriptor's lifetime.
        descriptor = _descriptor(record.path, os.stat(record.path).st_ino, os.getpid())
        data = os.pread(descriptor.number, record.length, record.offset)
    except OSError as error:
        raise DataError(f"{record.path} cannot be read ({error.strerror}) for key {record.key!r}.") from None
    if len(data) != record.length:
        raise DataError(f"{record.path} ends inside the image of key {record.key!r}; it changed or was cut.")
    return data


def decode(data: bytes, name: str) -> Image.Image:
    """Decodes JPEG, PNG or WebP bytes to an upright RGB image, EXIF rotation applied, the first frame if animated.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; alpha is dropped, as open_clip and torchvision do.
    Raises DataError naming `name` if the bytes are not such an image.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        # Not ImageOps.exif_transpose: it fails on EXIF that can be read but not be written back.
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        image = image if turn is None else image.transpose(turn)
    except UnidentifiedImageError:
        raise DataError(f"{name} is no JPEG, PNG or WebP image ({len(data)} bytes).") from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be decoded ({error}).") from None
    if image.mode.startswith("I"):
        # Pillow's own conversion of 16-bit grey clips at 255 instead of scaling.
        image = Image.fromarray((np.asarray(image, dtype=np.uint32).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_image(record: ImageRecord) -> tuple[Image.Image, bytes]:
    """Reads and decodes one image: (upright RGB, encoded bytes). Raises DataError naming file and key."""
    data = read_bytes(record)
    return decode(data, f"{record.path}: image {record.key!r}"), data
