"""import: centroids and tokens that were computed elsewhere -> a codebook and a token store like our own.

Rows are joined to images by the names in a CSV; nothing is taken by its position among the images.
"""

from collections.abc import Sequence
from pathlib import Path

from ..shared.errors import UsageError
from ..shared.runtime.devices import refuse_many_processes
from ..shared.tokens.codebook import Codebook
from ..shared.tokens.store import TokenStore
from .importing.centroids import import_centroids
from .importing.tokens import import_store
from .towers.tower import TowerSettings


def import_tokens(
    out: str | Path,
    *,
    centroids: str | Path | None = None,
    tower: str = "RN50x64",
    pretrained: str | None = None,
    layer: int = -1,
    final_norm: bool = False,
    image_size: int | None = None,
    precision: str = "float32",
    metric: str = "l2",
    device: str = "auto",
    tokens: str | Path | None = None,
    csv: str | Path | None = None,
    images: str | Path | Sequence[str | Path] | None = None,
    codebook: str | Path | None = None,
) -> Codebook | TokenStore:
    """Takes centroids into a codebook, or (in another call) tokens into a token store.

    Args:
        out: folder to write: a codebook with `centroids`, a token store with `tokens`.
        centroids: .npy, floats (K, dim).
        tower, pretrained, layer, final_norm, image_size, precision: what gave the features, as for `build_codebook`.
        metric: "l2", or "cosine" (centroids of length one).
        device: where the tower is opened.
        tokens: .npy, integers (n, H * W) or (n, H, W); row i belongs to the image that row i of `csv` names.
        csv: list of images; the column path, file, filename, image or key, or else the first one, holds a key or a
            path whose key (in a folder: relative to it) is one of the source's.
        images: the source, local, as for `build_codebook`; crops are the tower's centre crops.
        codebook: the codebook of the tokens.

    Raises:
        DataError for arrays of another shape or with impossible values, and for images that are missing, foreign or
        named twice; UsageError for options that do not fit together or an `out` that holds something else.
    """
    refuse_many_processes()
    parts = {"--tokens": tokens, "--csv": csv, "--images": images, "--codebook": codebook}
    missing = [name for name, value in parts.items() if value is None]
    if centroids is not None and len(missing) == len(parts):
        settings = TowerSettings(tower, pretrained, image_size, layer, final_norm, precision)
        return import_centroids(Path(centroids), Path(out), settings, metric, device)
    if centroids is None and not missing:
        return import_store(Path(tokens), Path(csv), images, codebook, Path(out))
    raise UsageError(
        "import takes either --centroids (a codebook) or all of --tokens, --csv, --images and --codebook (a token "
        f"store){'; missing: ' + ', '.join(missing) if centroids is None else ''}."
    )


# Centroids


# Tokens
