"""features: images through frozen weights, one vector an image and one a patch, in one Zarr group."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from ..shared.images.records import ImageRecord
from ..shared.images.sources import read_records
from ..shared.runtime.console import progress, table
from ..shared.runtime.devices import choose_device, choose_workers
from ..shared.storage.files import refuse_existing, written_whole
from ..shared.tokens.rows import NO_LABEL
from .evaluation.embed import embed, normalised_views
from .weights.read import load_weights
from .weights.weights import Weights

FORMAT, VERSION = "mapet-features", 1
# At ViT-B's 14x14 patches of 768 numbers, chunks of about 10 MB and 0.4 MB.
_IMAGES_PER_CHUNK = {"patches": 16, "pooled": 128, "keys": 8192, "labels": 8192}
_AXES = ("image", "row", "column", "feature")


def features(
    images: str | Path | Sequence[str | Path],
    weights: str | Path,
    out: str | Path,
    *,
    patches: bool = True,
    image_size: int | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    device: str = "auto",
) -> Path:
    """Writes the frozen features of images as one Zarr v3 group, and returns its path.

    For n images in the source's order and a model with an H x W grid of patches, the group holds:

    - `keys` (n,) str: WebDataset keys;
    - `pooled` (n, dim) float32: the mean over patches of the final norm's output, which is what `probe` measures;
      of a fine-tuned model, what its head reads;
    - `patches` (n, H, W, dim) float32, raster order: the final norm's output; of a fine-tuned model, which has no such
      norm, the last block's;
    - `labels` (n,) int64, if any image has one, -1 where an image has none;
    - attributes: format and version, path and SHA-256 of the weights, their kind and shape, preprocessing, grid.

    Every chunk carries a CRC32C. The whole image is resized (shorter side), then its centre is cropped.

    Args:
        images: a tar, a folder, a brace pattern of tars, or a list of tars; images of any size.
        weights: a run, a checkpoint folder, an imported or exported folder, or a published `.pth.tar`.
        out: the group's folder, such as `features.zarr`; it must not exist, or be empty. It appears when it is whole.
        patches: False leaves `patches` out, which is H * W times as large as `pooled`.
        image_size: pixels; position embeddings are resampled to another grid (bicubic, antialiased).
        batch_size, workers, device: how to run.

    Raises:
        DataError if weights or images cannot be read; UsageError if `out` is taken, or `image_size` does not fit.
    """
    refuse_existing(out := Path(out))
    device = choose_device(device)
    found = load_weights(weights).resized(image_size)
    records = read_records(images)
    model = found.vit().to(device)
    shown = normalised_views(records, found.preprocess, batch_size, choose_workers(workers, device), device)
    with written_whole(out) as partial, progress("extracting features", len(records)) as advance:
        group = _create(partial, found, records, patches)
        start = 0
        for batch in shown:
            end = start + len(batch)
            pooled, rows = embed(model, batch)
            group["pooled"][start:end] = pooled.cpu().numpy()
            if patches:
                group["patches"][start:end] = rows.unflatten(1, (found.grid, found.grid)).cpu().numpy()
            advance(end - start)
            start = end
    _summary(found, out)
    return out


def _create(path: Path, found: Weights, records: list[ImageRecord], patches: bool) -> zarr.Group:
    """The group with its keys and labels written and its features still to come."""
    count, dim, grid = len(records), found.shape.dim, found.grid
    group = zarr.create_group(path, attributes=_about(found))
    labels = [NO_LABEL if record.label is None else record.label for record in records]
    columns = {"keys": np.array([record.key for record in records], dtype=object)}
    if any(record.label is not None for record in records):
        columns["labels"] = np.array(labels, dtype=np.int64)
    for name, data in columns.items():
        _array(group, name, (count,), str if name == "keys" else np.int64)[:] = data
    _array(group, "pooled", (count, dim), np.float32)
    if patches:
        _array(group, "patches", (count, grid, grid, dim), np.float32)
    return group


def _array(group: zarr.Group, name: str, shape: tuple[int, ...], kind: type) -> zarr.Array:
    return group.create_array(
        name,
        shape=shape,
        dtype=kind,
        chunks=(min(shape[0], _IMAGES_PER_CHUNK[name]), *shape[1:]),
        # Mantissas of features hardly compress; Zarr leaves chunks unchecked unless told otherwise.
        compressors=[Crc32cCodec()],
        # A chunk that is lost must not read as features of zero.
        fill_value=np.nan if kind is np.float32 else None,
        dimension_names=("image", "feature") if len(shape) == 2 else _AXES[: len(shape)],
    )


def _about(found: Weights) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "weights": {"path": str(found.file), "sha256": found.sha256(), "kind": found.kind},
        "shape": found.shape.to_json(),
        "preprocess": found.preprocess.to_json(),
        "grid": [found.grid, found.grid],
    }


def _summary(found: Weights, out: Path) -> None:
    arrays = sorted(zarr.open_group(out, mode="r").arrays())
    types = {name: "str" if name == "keys" else array.dtype for name, array in arrays}
    rows = [(name, f"{' x '.join(map(str, array.shape))}, {types[name]}") for name, array in arrays]
    table("Features", [("weights", f"{found.file} ({found.kind})"), *rows, ("to", str(out))])
