"""The images that are measured, in one tar, and the tokens that the training loader joins them with."""

from pathlib import Path

import numpy as np

from ..quickstart.demo import copy_images
from ..quickstart.drawings import write_drawings
from ..shared.errors import DataError
from ..shared.images.views import ViewPolicy
from ..shared.sources.keys import KeyLedger
from ..shared.sources.records import ImageRecord
from ..shared.sources.sources import SourceShard, open_source
from ..shared.tokens.store import TokenStore
from ..tokenize_stage.encoding.shards import Encoder
from ..tokenize_stage.encoding.writing import begin_store, finish_store, write_shards
from ..tokenize_stage.towers.opening import open_tower
from ..tokenize_stage.towers.tower import TowerSettings
from ..train_stage.data.dataset import TokenisedImages
from ..train_stage.data.join import join
from ..train_stage.settings import ModelSettings
from .tokenizing import ready_pixels, with_random_codes

MOST_IMAGES = 256
_DRAWN, _DRAWN_SIZE, _SEED = 32, 432, 9
"""Drawings with as many pixels as ImageNet's average photograph of 500 x 375."""
_CODES, _VIEWS = 16, 2


def one_tar(images: str | Path | None, folder: Path) -> SourceShard:
    """A tar in `folder` with at most `MOST_IMAGES` images, spread over the first shard of `images`; None draws some.

    Raises DataError if an image cannot be read or if there is none, UsageError for an invalid pattern.
    """
    tar = folder / "images" / "images-000000.tar"
    if images is None:
        write_drawings(tar.parent, _DRAWN, seed=_SEED, prefix="images", size=_DRAWN_SIZE)
    else:
        tar.parent.mkdir()
        with open_source(images)[0].staged() as shard:
            records = _spread(shard.index())
            if not records:
                raise DataError(f"{shard.title} holds no images; give --images that hold some.")
            copy_images(records, tar)
    (copied,) = open_source(tar)
    return copied


def _spread(records: list[ImageRecord]) -> list[ImageRecord]:
    places = np.linspace(0, len(records) - 1, min(len(records), MOST_IMAGES)).round().astype(int)
    return [records[place] for place in places]


def tokenised(shard: SourceShard, model: ModelSettings, folder: Path) -> TokenisedImages:
    """The images of a tar, joined with tokens of random crops on the grid of a model.

    The tokens are clusters of pixels: the time of a batch does not depend on what the tokens are.
    """
    settings = TowerSettings(f"pixels:{model.patch_size}", image_size=model.image_size)
    tower, records = open_tower(settings), shard.index()
    tokenizer = with_random_codes(tower, _CODES, ready_pixels(records[:1], tower.preprocess))
    encoder = Encoder(tokenizer, ViewPolicy("random-resized", _VIEWS), False, 16, 0)
    out, ledger = folder / "tokens", KeyLedger()
    ledger.add(shard.name, (record.key for record in records))
    out.mkdir()
    begin_store(out, encoder)
    write_shards(out, encoder, [shard], ledger, "zarr")
    finish_store(out, [shard], ledger, changed=True)
    return join(str(shard.root), TokenStore(out))
