"""The token store's other shard format: WebDataset tars with each image beside its tokens, usable on their own.

KEY.jpg          the image's bytes, under its extension in the source
KEY.cls          its label, a class number or name, if it has one
KEY.tokens.npy   (V, H, W) uint16, or uint32 where K is more than 65,536
KEY.views.json   crops [[top, left, height, width], ...] in upright source pixels and flips, one of each per view; the
                 image's size [height, width]; the CRC32 of its bytes; the fingerprint of the tokenizer; the key, if
                 KEY is not the key itself

WebDataset ends a key at the first dot of a base name. A dot in the base name of a key is written as %2E.
"""

import io
import tarfile
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from ..artifacts.codes import UINT16, Dtype, Tokens
from ..artifacts.fields import Finite, Pixels
from ..errors import DataError
from ..labels.columns import to_column
from ..labels.parsing import stored_label
from ..sources.keys import EXTENSIONS, extension_of, key_of
from ..sources.records import ImageRecord, crc32, read_bytes
from ..storage.files import canonical_json
from .rows import ShardRows, concatenate_rows, empty_rows

_TOKENS, _VIEWS = "tokens.npy", "views.json"
_MOST_EXTRA_BYTES = 4096
"""The largest header of tokens.npy, and what views.json has besides its views."""
_DAMAGE = (tarfile.TarError, OSError, LookupError, TypeError, ValueError, OverflowError, RecursionError, MemoryError)
"""What tarfile, NumPy and msgspec raise for content that `write_tar` did not write."""


class _ViewsJson(Struct):
    """KEY.views.json"""

    crops: list[tuple[Finite, Finite, Finite, Finite]]
    flips: list[bool]
    size: tuple[Pixels, Pixels]
    crc32: Annotated[int, Meta(ge=0, lt=2**32)]
    key: str | UnsetType = UNSET
    """The image's key, if the names of the members do not give it."""


def write_tar(path: Path, rows: ShardRows, records: Sequence[ImageRecord], codebook_fingerprint: str) -> None:
    """Writes a tokenised tar, one image in memory at a time; the same rows and images always give the same bytes.

    `records` are the images of the rows, in the same order; `codebook_fingerprint` is the tokenizer's. Raises DataError
    if an image cannot be read or was changed since it was encoded.
    """
    from webdataset import TarWriter

    # PAX, because WebDataset's default (USTAR) cannot store long names.
    headers = {"user": "mapet", "group": "mapet", "mtime": 0, "format": "PAX_FORMAT"}
    with open(path, "wb") as file, TarWriter(file, encoder=False, **headers) as tar:
        for row, record in enumerate(records):
            content = read_bytes(record)
            if crc32(content) != rows.crc32[row]:
                raise DataError(
                    f"{record.path}: image {record.key!r} changed while it was encoded (its CRC32 differs); "
                    "leave the source alone and give the same command again."
                )
            members = _members_beside_image(rows, row, codebook_fingerprint)
            tar.write({"__key__": _written_key(record.key), record.extension: content, **members})


def _written_key(key: str) -> str:
    """The key as it begins the names of members, without dots in its base name."""
    directory, slash, base = key.rpartition("/")
    if "." not in base and "%2E" not in base:
        return key
    return f"{directory}{slash}{base.replace('%', '%25').replace('.', '%2E')}"


def _members_beside_image(rows: ShardRows, row: int, codebook_fingerprint: str) -> dict[str, bytes]:
    """The members of a sample except the image: extension -> bytes."""
    tokens = io.BytesIO()
    np.save(tokens, rows.tokens[row])
    views = {
        "codebook_fingerprint": codebook_fingerprint,
        "crc32": int(rows.crc32[row]),
        "crops": rows.crops[row].tolist(),
        "flips": rows.flips[row].tolist(),
        "size": rows.sizes[row].tolist(),
    }
    if _written_key(rows.keys[row]) != rows.keys[row]:
        views["key"] = rows.keys[row]
    label = rows.label(row)
    members = {_TOKENS: tokens.getvalue(), _VIEWS: canonical_json(views).encode()}
    return members if label is None else {**members, "cls": str(label).encode()}


def bytes_of_tar(rows: ShardRows) -> int:
    """Approximate bytes of a tokenised tar of these rows."""
    sizes = [
        size
        for row in range(len(rows))
        for size in (int(rows.lengths[row]), *map(len, _members_beside_image(rows, row, "0" * 64).values()))
    ]
    return sum(tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for size in sizes)


def read_tar(path: Path, views: int, grid: tuple[int, int], dtype: Dtype = UINT16) -> ShardRows:
    """The rows of a tokenised tar with `views` views per image and `grid` (H, W) tokens of type `dtype` per view.

    The images are skipped, not read; offsets and lengths are those inside this tar. Raises DataError if the tar was not
    written by `write_tar` or is damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            expected = empty_rows(views, grid, dtype)
            parts = [_row(tar, key, sample, expected.tokens) for key, sample in _samples(tar)]
    except _DAMAGE as error:
        raise DataError(f"{path} is not a tar of images and their tokens ({str(error)[:200]})") from None
    return concatenate_rows([expected, *parts])


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yields (key, its members by extension) of consecutive members with the same key."""
    key, sample, end = "", dict[str, tarfile.TarInfo](), 0
    for member in tar:
        # tarfile follows a negative size backwards, for ever.
        if member.offset < end or member.size < 0 or not member.isreg() or member.issparse():
            raise ValueError(f"{member.name[:200]!r} is not a plain file")
        end = member.offset_data
        member_key = key_of(member.name)
        if member_key != key and sample:
            yield key, sample
            sample = {}
        key = member_key
        sample[member.name[len(key) + 1 :]] = member
    if sample:
        yield key, sample


def _row(tar: tarfile.TarFile, key: str, sample: dict[str, tarfile.TarInfo], expected: Tokens) -> ShardRows:
    """The single row of one image, with tokens of the shape and type of `expected` (0, V, H, W)."""
    views = expected.shape[1]
    (image,) = (member for member in sample.values() if extension_of(member.name) in EXTENSIONS)
    most = expected.itemsize * prod(expected.shape[1:]) + _MOST_EXTRA_BYTES
    tokens = _tokens(_content(tar, sample[_TOKENS], most), expected.dtype, expected.shape[1:])
    views_json = msgspec.json.decode(_content(tar, sample[_VIEWS], 256 * views + _MOST_EXTRA_BYTES), type=_ViewsJson)
    if not len(views_json.crops) == len(views_json.flips) == views:
        raise ValueError(f"{key}.{_VIEWS} has {len(views_json.crops)} crops for {views} views")
    label = stored_label(_content(tar, sample["cls"], _MOST_EXTRA_BYTES)) if "cls" in sample else None
    labels, classes = to_column([label])
    return ShardRows(
        keys=np.array([key if views_json.key is UNSET else views_json.key], dtype=object),
        tokens=tokens[None],
        crops=np.array([views_json.crops], dtype=np.float64).reshape(1, views, 4),
        flips=np.array([views_json.flips], dtype=bool).reshape(1, views),
        sizes=np.array([views_json.size], dtype=np.int32).reshape(1, 2),
        labels=labels,
        paths=np.array([""], dtype=object),
        offsets=np.array([image.offset_data], dtype=np.int64),
        lengths=np.array([image.size], dtype=np.int64),
        crc32=np.array([views_json.crc32], dtype=np.uint32),
        classes=classes,
    )


def _tokens(npy: bytes, expected: np.dtype[Any], expected_shape: tuple[int, ...]) -> Tokens:
    """The tokens (V, H, W) of a .npy file; nothing is allocated for another shape or type."""
    file = io.BytesIO(npy)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"{_TOKENS} of version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    content = npy[file.tell() :]
    if dtype != expected or shape != expected_shape or fortran or len(content) != expected.itemsize * prod(shape):
        raise ValueError(f"{_TOKENS} is {dtype} {shape}, not {expected} {expected_shape}")
    return np.frombuffer(content, dtype=dtype).astype(expected).reshape(shape)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    """The bytes of a small member. Raises ValueError if it states more than `most`."""
    if member.size > most:
        raise ValueError(f"{member.name[:200]!r} has {member.size:,} bytes")
    file = tar.fileobj
    assert file is not None
    file.seek(member.offset_data)
    return file.read(member.size)
