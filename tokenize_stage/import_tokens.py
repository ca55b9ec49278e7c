"""import: centroids or tokens that were computed elsewhere -> a codebook or a token store."""

from collections.abc import Sequence
from pathlib import Path

from ..shared.errors import UsageError
from ..shared.runtime.devices import refuse_many_processes
from ..shared.sources.options import SourceOptions
from ..shared.storage.lock import writes_to_out
from ..shared.tokens.codebook import Codebook
from ..shared.tokens.store import TokenStore
from .importing.centroids import import_centroids
from .importing.published import import_published
from .importing.tokens import import_store
from .towers.tower import TowerSettings


@writes_to_out
def import_codebook(
    out: str | Path,
    *,
    centroids: str | Path,
    tower: str = "RN50x64",
    pretrained: str | None = None,
    layer: int = -1,
    final_norm: bool = False,
    image_size: int | None = None,
    precision: str = "float32",
    metric: str = "l2",
    device: str = "auto",
) -> Codebook:
    """Takes centroids that were computed elsewhere into a codebook.

    Args:
        out: Folder to write the codebook to.
        centroids: .npy of floats (K, dim).
        tower: open_clip name, local-dir:PATH, hf-hub:ID, timm:NAME or pixels, whose features were clustered.
        pretrained: Tag or local file; 'none' for random weights (default: openai, or timm's own).
        layer: Index into forward_intermediates, negative from the end.
        final_norm: Take ViT features after the final norm.
        image_size: Pixels (default: the tower's own).
        precision: Precision of the tower, float32 or bfloat16.
        metric: Metric of the centroids, l2, or cosine (of length one).
        device: auto, cpu or cuda.

    Returns:
        The codebook in `out`.

    Raises:
        DataError: The centroids have the wrong shape, type or length, or do not fit the tower.
        UsageError: An option is invalid, or `out` holds something else.
    """
    refuse_many_processes()
    settings = TowerSettings(tower, pretrained, image_size, layer, final_norm, precision)
    return import_centroids(Path(centroids), Path(out), settings, metric, device)


@writes_to_out
def import_tokenizer(
    out: str | Path,
    *,
    vqkd: str | Path | None = None,
    dvae: str | Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
) -> Codebook:
    """Takes a published tokenizer into a codebook folder, its encoder included; nothing in its file is executed.

    Args:
        out: Folder to write the codebook to.
        vqkd: Published checkpoint of VQ-KD (BEiT v2), such as vqkd_encoder_base_decoder_3x768x12_clip.pth.
        dvae: Encoder of DALL-E's dVAE, encoder.pkl or a state dict of the FLAVA image codebook.
        image_size: Pixels (default: 112 for the dVAE; VQ-KD has a size of its own).
        device: auto, cpu or cuda.

    Returns:
        The codebook in `out`.

    Raises:
        DataError: The file is not such a tokenizer.
        UsageError: An option is invalid, or `out` holds something else.
    """
    refuse_many_processes()
    if (vqkd is None) == (dvae is None):
        raise UsageError("Give either --vqkd or --dvae, the file of one published tokenizer.")
    file, kind = (vqkd, "vqkd") if vqkd is not None else (dvae, "dvae")
    return import_published(Path(str(file)), Path(out), kind, image_size, device)


@writes_to_out
def import_tokens(
    out: str | Path,
    *,
    tokens: str | Path,
    csv: str | Path,
    images: str | Path | Sequence[str | Path],
    codebook: str | Path,
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    label_from: str | None = None,
    max_pixels: int | None = None,
) -> TokenStore:
    """Takes tokens that were computed elsewhere into a token store.

    Rows are joined to images by the names in the CSV and never by their order in the source.

    Args:
        out: Folder to write the token store to.
        tokens: .npy of integers (n, H*W) or (n, H, W).
        csv: CSV that names the image of each row of the tokens by key or path, in its column path, file, filename,
            image or key, or else in the first one.
        images: The images of the tokens, a local tar, a folder, or a pattern of tars; crops are their centre crops.
        codebook: The codebook of the tokens.
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        label_from: auto, or tar: the class of a tar's images is the name of the tar.
        max_pixels: Most pixels of an image (default: 178,956,970).

    Returns:
        The token store in `out`.

    Raises:
        DataError: The tokens have the wrong shape or are not below K, or an image is missing, foreign or named twice.
        UsageError: `out` holds something else.
    """
    refuse_many_processes()
    options = SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from)
    return import_store(Path(tokens), Path(csv), images, codebook, Path(out), options)


def which_import(
    *,
    centroids: object,
    tokens: object,
    csv: object,
    images: object,
    codebook: object,
    vqkd: object = None,
    dvae: object = None,
) -> str:
    """Which import the options of `mapet tokenize import` ask for: "codebook", "tokenizer" or "tokens".

    An option that was not given is None. Raises UsageError unless `centroids`, `vqkd` or `dvae` alone or all others are
    given.
    """
    parts = {"--tokens": tokens, "--csv": csv, "--images": images, "--codebook": codebook}
    missing = [name for name, value in parts.items() if value is None]
    if vqkd is not None or dvae is not None:
        single = {"--centroids": centroids, "--vqkd": vqkd, "--dvae": dvae}
        given = [name for name, value in (single | parts).items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"import takes one thing at a time; {' and '.join(given)} do not go together.")
        return "tokenizer"
    if centroids is not None and len(missing) == len(parts):
        return "codebook"
    if centroids is None and not missing:
        return "tokens"
    raise UsageError(
        "import takes --centroids (a codebook), --vqkd or --dvae (a published tokenizer), or all of --tokens, --csv, "
        "--images and --codebook (a token store)"
        f"{'; missing: ' + ', '.join(missing) if centroids is None else ''}."
    )
