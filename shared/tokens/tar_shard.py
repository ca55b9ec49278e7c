"""The token store's other shard format: WebDataset tars with each image beside its tokens, usable on their own.

KEY.jpg          the image's bytes, under its extension in the source
KEY.cls          its label, if it has one
KEY.tokens.npy   (V, H, W) uint16
KEY.views.json   crops [[top, left, height, width], ...] in upright source pixels and flips, one of each per view; the
                 image's size [height, width]; the CRC32 of its bytes; the fingerprint of the tokenizer; the key, if
                 KEY is not the key itself

WebDataset ends a key at the first dot of a base name. A dot in the base name of a key is written as %2E.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..sources.keys import EXTENSIONS, extension_of, key_of
from ..sources.records import ImageRecord, crc32, read_bytes
from ..storage.files import canonical_json
from .rows import NO_LABEL, ShardRows, concatenate_rows, empty_rows

_TOKENS, _VIEWS = "tokens.npy", "views.json"


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
    label = {} if rows.labels[row] == NO_LABEL else {"cls": str(rows.labels[row]).encode()}
    return {_TOKENS: tokens.getvalue(), _VIEWS: canonical_json(views).encode(), **label}


def bytes_of_tar(rows: ShardRows) -> int:
    """Approximate bytes of a tokenised tar of these rows."""
    sizes = [
        size
        for row in range(len(rows))
        for size in (int(rows.lengths[row]), *map(len, _members_beside_image(rows, row, "0" * 64).values()))
    ]
    return sum(tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for size in sizes)


def read_tar(path: Path, views: int, grid: tuple[int, int]) -> ShardRows:
    """The rows of a tokenised tar with `views` views per image and `grid` (H, W) tokens per view.

    The images are skipped, not read; offsets and lengths are those inside this tar. Raises DataError if the tar was not
    written by `write_tar` or is damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            parts = [_row(tar, key, sample, views, grid) for key, sample in _samples(tar)]
    except (tarfile.TarError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a tar of images and their tokens ({error})") from None
    return concatenate_rows([empty_rows(views, grid), *parts])


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yields (key, its members by extension) of consecutive members with the same key."""
    key, sample = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        member_key = key_of(member.name)
        if member_key != key and sample:
            yield key, sample
            sample = {}
        key = member_key
        sample[member.name[len(key) + 1 :]] = member
    if sample:
        yield key, sample


def _row(
    tar: tarfile.TarFile, key: str, sample: dict[str, tarfile.TarInfo], views: int, grid: tuple[int, int]
) -> ShardRows:
    """The single row of one image."""
    (image,) = (member for member in sample.values() if extension_of(member.name) in EXTENSIONS)
    tokens = np.load(io.BytesIO(_content(tar, sample[_TOKENS])), allow_pickle=False)
    views_json: dict[str, Any] = json.loads(_content(tar, sample[_VIEWS]))
    if tokens.dtype != np.uint16 or tokens.shape != (views, *grid):
        raise ValueError(f"{key}.{_TOKENS} is {tokens.dtype} {tokens.shape}")
    return ShardRows(
        keys=np.array([str(views_json.get("key", key))], dtype=object),
        tokens=tokens[None],
        crops=np.array([views_json["crops"]], dtype=np.float64).reshape(1, views, 4),
        flips=np.array([views_json["flips"]], dtype=bool).reshape(1, views),
        sizes=np.array([views_json["size"]], dtype=np.int32).reshape(1, 2),
        labels=np.array([int(_content(tar, sample["cls"])) if "cls" in sample else NO_LABEL], dtype=np.int64),
        paths=np.array([""], dtype=object),
        offsets=np.array([image.offset_data], dtype=np.int64),
        lengths=np.array([image.size], dtype=np.int64),
        crc32=np.array([views_json["crc32"]], dtype=np.uint32),
    )


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.fileobj
    assert file is not None
    file.seek(member.offset_data)
    return file.read(member.size)
