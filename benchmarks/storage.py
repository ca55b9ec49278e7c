"""How small a token store is: bytes per view of each column, by codec and chunk, against what tokens carry.

python benchmarks/storage.py TOKENS [--reads 5]

One JSON line for the store (bytes per image and view, against ceil(log2 K) bits a token and the tokens' zero-order
entropy), one for each column as it is stored, and one for each codec and chunk length tried on the tokens and on all
other columns together, with the speed of decoding. Rows are taken shard by shard, as the store holds them.
"""

import json
import math
import time

import numpy as np
import typer
import zarr
from mapet.shared.tokens.rows import COLUMNS, STRINGS
from mapet.shared.tokens.store import TokenStore
from mapet.shared.tokens.zarr_shard import ROWS_PER_CHUNK, other_codec, token_codec
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import MemoryStore

CHUNKS = (256, 1024, 1_000_000)


def candidates(typesize: int) -> dict[str, list]:
    """The codecs to try, by name; Blosc's two shuffles only where there is a size of element to shuffle by."""
    found = {"raw": [], "gzip 9": [GzipCodec(level=9)]}
    found |= {f"zstd {level}": [ZstdCodec(level=level)] for level in (1, 3, 9, 19)}
    for shuffle in ("shuffle", "bitshuffle") if typesize else ():
        for cname, level in (("lz4", 5), ("zstd", 5), ("zstd", 9)):
            codec = BloscCodec(cname=cname, clevel=level, shuffle=shuffle, typesize=typesize)
            found[f"blosc {cname} {level} {shuffle}"] = [codec]
    return found


def stored(column: np.ndarray, codecs: list, rows: int, reads: int) -> tuple[int, float]:
    """(bytes of the chunks, seconds of the fastest reading) of one shard's column."""
    files: dict = {}
    chunks = (min(max(len(column), 1), rows), *column.shape[1:])
    kind = str if column.dtype == object else column.dtype
    group = zarr.create_group(MemoryStore(files))
    array = group.create_array("x", shape=column.shape, chunks=chunks, dtype=kind, compressors=[*codecs, Crc32cCodec()])
    array[:] = column
    seconds = []
    for _ in range(reads):
        began = time.perf_counter()
        array[:]
        seconds.append(time.perf_counter() - began)
    return sum(len(data.to_bytes()) for name, data in files.items() if name.startswith("x/c")), min(seconds)


def entropy(tokens: np.ndarray) -> float:
    """Zero-order entropy in bits a token."""
    share = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(share * np.log2(share)).sum())


def main(tokens: str, reads: int = 5) -> None:
    store = TokenStore(tokens)
    shards = [rows for _, rows in store.shards()]
    images, views = sum(map(len, shards)), sum(rows.flips.size for rows in shards)
    patches, bits = math.prod(store.grid), entropy(np.concatenate([rows.tokens.reshape(-1) for rows in shards]))
    written = sum(entry["bytes"] for entry in store.entries.values())

    def say(figure: str, **values: object) -> None:
        rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in values.items()}
        print(json.dumps({"figure": figure, **rounded}), flush=True)

    say(
        f"store {store.path.name} ({store.storage})",
        images=images,
        views=store.views,
        bytes_per_image=written / images,
        bytes_per_view=written / views,
        plain_bits_bytes_per_view=math.ceil(math.log2(store.k)) * patches / 8,
        entropy_bits_per_token=bits,
        entropy_bytes_per_view=bits * patches / 8,
    )
    for field in COLUMNS:
        codec = token_codec(np.dtype(store.dtype).itemsize) if field == "tokens" else other_codec()
        sizes = [stored(getattr(rows, field), [codec], ROWS_PER_CHUNK, 1)[0] for rows in shards]
        say(f"column {field}", bytes_per_view=sum(sizes) / views)
    others = [name for name in COLUMNS if name != "tokens"]
    for name in candidates(2):
        for rows in CHUNKS:
            compare("tokens", ["tokens"], name, rows, shards, views, reads, say)
            compare("other columns", others, name, rows, shards, views, reads, say)


def compare(what: str, columns: list[str], name: str, rows: int, shards, views: int, reads: int, say) -> None:
    """Tells bytes per view and MB/s of reading for one codec; columns of text take Zstandard where Blosc is tried."""
    size, seconds, plain = 0, 0.0, 0
    for shard in shards:
        for column in columns:
            data = getattr(shard, column)
            codecs = candidates(0 if column in STRINGS else data.itemsize).get(name, [other_codec()])
            one, took = stored(data, codecs, rows, reads)
            size, seconds, plain = size + one, seconds + took, plain + data.nbytes
    speed = plain / 1e6 / seconds
    say(f"{what}, {name}", rows_per_chunk=rows, bytes_per_view=size / views, read_mb_per_s=speed)


if __name__ == "__main__":
    typer.run(main)
