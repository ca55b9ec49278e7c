"""features: writes the frozen features of images, one vector per image and one per patch, as a Zarr group."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from ..shared.labels.columns import to_column
from ..shared.runtime.console import progress, table
from ..shared.runtime.devices import choose_device, choose_workers, refuse_many_processes
from ..shared.sources.options import SourceOptions
from ..shared.sources.records import ImageRecord
from ..shared.sources.sources import read_records
from ..shared.storage.files import refuse_existing, written_whole
from ..shared.storage.lock import writes_to_out
from .evaluation.embed import embed, normalised_views, refuse_not_finite
from .weights.read import load_weights
from .weights.weights import Weights

FORMAT, VERSION = "mapet-features", 1
_IMAGES_PER_CHUNK = {"patches": 16, "pooled": 128, "keys": 8192, "labels": 8192}
"""With ViT-B (14x14 patches, 768 channels), chunks are about 10 MB and 0.4 MB."""
_AXES = ("image", "row", "column", "feature")


@writes_to_out
def features(
    images: str | Path | Sequence[str | Path],
    weights: str | Path,
    out: str | Path,
    *,
    labels: str | Path | None = None,
    label_field: str | None = None,
    patches: bool = True,
    image_size: int | None = None,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    label_from: str | None = None,
    max_pixels: int | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    device: str = "auto",
) -> Path:
    """Writes the frozen features of images as one Zarr v3 group.

    For n images in the source's order and a model with an H x W grid of patches, the group holds:

    - `keys` (n,) str: WebDataset keys;
    - `pooled` (n, dim) float32: the mean over patches of the final norm's output, which is what `probe` measures;
      for a fine-tuned model, the input of its head;
    - `patches` (n, H, W, dim) float32, raster order: the final norm's output; for a fine-tuned model, which has no such
      norm, the last block's output;
    - `labels` (n,) int64, if any image has one; -1 for an image without. If labels are class names, the attribute
      `classes` lists them, sorted, and a label is an index of that list;
    - attributes: format and version, path and SHA-256 of the weights, their kind and shape, preprocessing, grid.

    Every chunk carries a CRC32C. The shorter side of an image is resized to the model's size, then its centre is
    cropped.

    Args:
        images: Tars, folders of tars, or folders of class folders; patterns and globs included; images of any size.
        weights: A run, a checkpoint, an imported or exported folder, or a published .pth.tar.
        out: Zarr group to write, such as features.zarr. It must not exist, or be empty; it appears when it is complete.
        labels: File of labels: a number or name a line in the sorted order of the images, or a CSV or JSON lines with a
            key column.
        label_field: Field of the tars' JSON members that holds the label; of a file of labels, its label column.
        patches: Write the features of each patch too, H x W times as much.
        image_size: Pixels; resamples the position embeddings to another grid (default: as it was).
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        label_from: auto, or tar: the class of a tar's images is the name of the tar.
        max_pixels: Most pixels of an image (default: 178,956,970).
        batch_size: Images per forward pass.
        workers: Processes that decode images (default: none on the CPU, up to 16 on CUDA).
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Returns:
        The group's folder.

    Raises:
        DataError if weights or images cannot be read, or if features hold NaN or infinity; UsageError if `out` is taken
        or `image_size` does not fit the patches.
    """
    refuse_many_processes()
    refuse_existing(folder := Path(out))
    device_name = choose_device(device)
    loaded = load_weights(weights).resized(image_size)
    source = SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from)
    records = read_records(images, options=source, labels=labels, label_field=label_field)
    model = loaded.vit().to(device_name)
    worker_count = choose_workers(workers, device_name)
    batches = normalised_views(records, loaded.preprocess, batch_size, worker_count, device_name)
    with written_whole(folder) as partial, progress("extracting features", len(records)) as advance:
        arrays = _create(partial, loaded, records, patches)
        start = 0
        for batch in batches:
            end = start + len(batch)
            pooled, rows = embed(model, batch)
            for part in (pooled, rows):  # a patch may hold infinity and the mean over patches not, or the reverse
                refuse_not_finite(part, records[start:], "features")
            arrays["pooled"][start:end] = pooled.cpu().numpy()
            if patches:
                grid = rows.view(len(rows), loaded.grid, loaded.grid, -1)
                arrays["patches"][start:end] = grid.cpu().numpy()
            advance(end - start)
            start = end
    show_features(loaded, folder)
    return folder


def _create(path: Path, weights: Weights, records: list[ImageRecord], patches: bool) -> "dict[str, zarr.Array[Any]]":
    """The arrays of a new group by name; keys and labels are filled, features are not."""
    count, dim, grid = len(records), weights.shape.dim, weights.grid
    group = zarr.create_group(path, attributes=_attributes(weights))
    arrays = {"keys": _array(group, "keys", (count,), str)}
    arrays["keys"][:] = np.array([record.key for record in records], dtype=object)
    if any(record.label is not None for record in records):
        labels, classes = to_column([record.label for record in records])
        arrays["labels"] = _array(group, "labels", (count,), np.int64)
        arrays["labels"][:] = labels
        if classes is not None:
            group.attrs["classes"] = list(classes)
    arrays["pooled"] = _array(group, "pooled", (count, dim), np.float32)
    if patches:
        arrays["patches"] = _array(group, "patches", (count, grid, grid, dim), np.float32)
    return arrays


def _array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: type) -> "zarr.Array[Any]":
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(min(shape[0], _IMAGES_PER_CHUNK[name]), *shape[1:]),
        # Mantissas of features hardly compress; Zarr leaves chunks unchecked unless told otherwise.
        compressors=[Crc32cCodec()],
        # A chunk that is lost must not read as features of zero.
        fill_value=np.nan if dtype is np.float32 else None,
        dimension_names=("image", "feature") if len(shape) == 2 else _AXES[: len(shape)],
    )


def _attributes(weights: Weights) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "weights": {"path": str(weights.file), "sha256": weights.sha256(), "kind": weights.kind},
        "shape": weights.shape.to_json(),
        "preprocess": weights.preprocess.to_json(),
        "grid": [weights.grid, weights.grid],
    }


def show_features(weights: Weights, out: Path) -> None:
    """Prints the arrays of a group of features."""
    arrays = sorted(zarr.open_group(out, mode="r").arrays())
    types = {name: "str" if name == "keys" else array.dtype for name, array in arrays}
    rows = [(name, f"{' x '.join(map(str, array.shape))}, {types[name]}") for name, array in arrays]
    table("Features", [("weights", f"{weights.file} ({weights.kind})"), *rows, ("to", str(out))])
