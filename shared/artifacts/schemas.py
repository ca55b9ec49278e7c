"""What codebook.json, manifest.json and the entries of shards hold. Fields that are not named here are left alone.

A field that a later version added is optional: its absence means what it meant before.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from .codes import UINT16, Codes, Dtype, token_dtype
from .fields import Count, Finite, Positive, PositiveTriple, Sha256, Share, Side, Size, Text, Triple

Name = Annotated[str, Meta(min_length=1, max_length=1024)]
Fingerprint = Annotated[str, Meta(min_length=1, max_length=128)]
Skipped = list[tuple[Text, Text]]
"""(key, reason) of what was left out."""


class Preprocess(Struct):
    """`shared.images.views.Preprocess`."""

    image_size: Size
    resize: Literal["shortest", "squash"]
    resize_size: Size
    interpolation: Literal["bicubic", "bilinear", "lanczos"]
    mean: Triple
    std: PositiveTriple


class Sample(Struct):
    """The sample of patches that k-means was trained on."""

    images: Count
    patches: Count
    skipped: Skipped | UnsetType = UNSET


class Usage(Struct):
    """Statistics of the codes over a sample; None where it was empty."""

    imbalance: Finite | UnsetType | None = UNSET
    mean_squared_distance: Finite | UnsetType | None = UNSET


class Imported(Struct):
    """The file that centroids were imported from."""

    name: Text
    sha256: Sha256


class TokenizerDescription(Struct):
    """codebook.json of a token store: the tokenizer that made the tokens, which need not have a tower."""

    fingerprint: Fingerprint
    k: Codes
    grid: tuple[Side, Side]
    preprocess: Preprocess
    dim: Size | UnsetType = UNSET
    tower: Text | UnsetType = UNSET
    pretrained: Text | UnsetType | None = UNSET
    image_size: Size | UnsetType | None = UNSET
    seed: int | UnsetType = UNSET
    request: dict[str, Any] | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    sample: Sample | UnsetType = UNSET
    imported: Imported | UnsetType = UNSET
    training: Usage | UnsetType | None = UNSET
    held_out: Usage | UnsetType | None = UNSET
    objective: list[list[Finite]] | UnsetType | None = UNSET
    imbalance: list[list[Finite]] | UnsetType | None = UNSET
    empty_clusters_split: list[list[Finite]] | UnsetType | None = UNSET
    best_restart: Count | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        is_complete = self.seed is not UNSET and self.versions is not UNSET and "faiss" in self.versions
        if self.sample is not UNSET and not is_complete:
            raise ValueError("a codebook with a sample names its seed and the version of faiss")


class CodebookDescription(TokenizerDescription, kw_only=True):
    """codebook.json of a codebook: k-means over the patch features of a tower."""

    centroids_sha256: Sha256
    dim: Size
    library: Text
    architecture: dict[str, Any]
    weights_sha256: Sha256
    tower: Text
    pretrained: Text | None
    image_size: Size | None
    layer: Annotated[int, Meta(ge=-(1 << 20), le=1 << 20)]
    final_norm: bool
    precision: Literal["float32", "bfloat16"]
    metric: Literal["l2", "cosine", "inner_product"]
    encoder_sha256: Sha256 | UnsetType = UNSET
    """Of `encoder.safetensors`, in the folder of an imported tokenizer."""


class View(Struct):
    """`shared.images.views.ViewPolicy.to_json`."""

    crop: Literal["center", "random-resized"]
    views: Annotated[int, Meta(ge=1, le=1 << 16)]
    scale: tuple[Positive, Positive] | UnsetType = UNSET
    ratio: tuple[Positive, Positive] | UnsetType = UNSET
    flip: Share | UnsetType = UNSET
    with_center: bool | UnsetType = UNSET
    seed: int | UnsetType = UNSET


class SourceOptions(Struct):
    """`shared.sources.options.SourceOptions.to_json`."""

    key_until: Literal["first-dot", "last-dot"] | UnsetType = UNSET
    key_prefix: Literal["none", "tar"] | UnsetType = UNSET
    image_field: Text | UnsetType = UNSET
    label_from: Literal["auto", "tar"] | UnsetType = UNSET
    max_pixels: Annotated[int, Meta(ge=1, le=2**62)] | UnsetType = UNSET


class Source(Struct):
    """The tar or folder that a shard was made of; `size` is None if a server did not tell it."""

    kind: Text
    size: Count | None
    sha256: Text
    options: SourceOptions | UnsetType = UNSET


class ShardEntry(Struct):
    """The entry of a shard of a token store."""

    name: Name
    file: Name
    storage: Literal["zarr", "webdataset"]
    images: Count
    grid: tuple[Side, Side]
    bytes: Count
    sha256: Sha256
    codebook_fingerprint: Fingerprint
    view: View
    source: Source
    rows_sha256: Sha256 | UnsetType = UNSET
    dtype: Dtype = UINT16
    """Of its tokens."""
    skipped: Skipped | UnsetType = UNSET
    unlabelled: Skipped | UnsetType = UNSET
    labels: dict[str, Text | None] | UnsetType | None = UNSET
    """Where labels came from, if not from the source: the digest of a list, or the field of JSON members."""
    classes: list[Text] | UnsetType | None = UNSET

    def __post_init__(self) -> None:
        if self.storage == "webdataset" and self.rows_sha256 is UNSET:
            raise ValueError("a tar of images and tokens has a rows_sha256")
        # Ten columns in chunks of at most 1,024 rows, each with names and checksums, take more than a byte per image.
        if self.images > self.bytes:
            raise ValueError(f"{self.images} images do not fit into {self.bytes} bytes")


class Manifest(Struct):
    """manifest.json of a token store."""

    codebook_fingerprint: Fingerprint
    codebook_sha256: Sha256
    k: Codes
    grid: tuple[Side, Side]
    storage: Literal["zarr", "webdataset"]
    images: Count
    shards: Annotated[list[ShardEntry], Meta(min_length=1)]
    dtype: Dtype = UINT16
    """Of the tokens; stated where it is not uint16."""

    def __post_init__(self) -> None:
        if self.dtype != token_dtype(self.k):
            raise ValueError(f"its tokens are {self.dtype}, and those of K = {self.k} are {token_dtype(self.k)}")
