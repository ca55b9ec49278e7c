"""Plans the sample that a codebook is trained on, before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...shared.errors import DataError
from ...shared.runtime.console import working
from ...shared.runtime.memory import memory_budget
from ...shared.tokens.codebook import TOKEN_FIELDS
from ..towers.tower import Tower
from .duration import say_if_long
from .feature_cache import FeatureCache
from .patch_sample import PatchSample, draw_sample
from .sampler import SourceKeys
from .train import KMeansSettings, refuse_little_memory

PATCHES_PER_CENTROID = 512
_MOST_HELD_OUT = 65_536
_HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class CodebookPlan:
    """The sample of a codebook, and the fields of the codebook's JSON that describe its origin."""

    sample: PatchSample
    extracted: PatchSample
    """The sample to extract; larger than `sample` if the features cache holds a larger one."""
    images: int
    """Images that the sample is drawn from."""
    tower: dict[str, Any]
    """`Tower.description`."""
    identity: dict[str, Any]
    """Everything that the features depend on."""
    request: dict[str, Any]
    """The options that the codebook depends on."""


def plan_codebook(
    tower: Tower,
    keys: SourceKeys,
    image_keys: Sequence[str],
    patches: int | None,
    kmeans: KMeansSettings,
    request: dict[str, Any],
    memory: str | None,
    cache: FeatureCache,
) -> CodebookPlan:
    """Draws the sample from the images of `image_keys` and prepares the folder of its features.

    Raises DataError if there are too few patches, or too little memory or disk space.
    """
    k, per_image = kmeans.k, tower.grid[0] * tower.grid[1]
    total = len(image_keys) * per_image
    held_out = min(_MOST_HELD_OUT, int(total * _HELD_OUT_SHARE))
    train = min(patches or PATCHES_PER_CENTROID * k, total - held_out)
    if k > train:
        raise DataError(
            f"--k {k} is larger than the sample: {len(image_keys)} images x {per_image} patches, less {held_out} "
            f"held out, capped by --patches, leave {train} patches; use a smaller --k or more images or patches."
        )
    refuse_little_memory(train, tower.dim, kmeans, memory_budget(memory))
    say_if_long(train, tower.dim, kmeans)
    with working("drawing the sample"):
        sample = draw_sample(image_keys, per_image, train, held_out, kmeans.seed)
    described = {**tower.description(), "metric": kmeans.metric}
    identity = {name: described[name] for name in TOKEN_FIELDS} | {
        "seed": kmeans.seed,
        "keys_sha256": request["keys_sha256"],
    }
    most = cache.begin(identity, keys.shards_sha256(), sample.most, train + held_out)
    return CodebookPlan(sample, replace(sample, most=most), len(image_keys), tower.description(), identity, request)
