"""What a training step sees: the pixels of an image's stored view, the tokens of that very view, its permutation.

Images and tokens are joined by key, and an image's bytes must be the ones that were encoded (CRC32).
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

from ..shared.console import say
from ..shared.errors import DataError, UsageError
from ..shared.images import ImageRecord, decode, keys_sha256, read_bytes
from ..shared.randomness import generator
from ..shared.sources import read_records
from ..shared.token_store import TokenStore
from ..shared.views import CropBox, replay, to_array, view_of_epoch
from .permutations import draw_permutation
from .settings import ModelSettings, Settings


@dataclass(frozen=True, eq=False)
class TokenisedImages:
    """Images joined with their rows of a token store: parallel sequences over n images, tokens (n, V, H, W) uint16,
    crops (n, V, 4) float64, flips (n, V) bool, crc32 (n,) uint32."""

    records: list[ImageRecord]
    tokens: np.ndarray
    crops: np.ndarray
    flips: np.ndarray
    crc32: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    def key(self, index: int) -> str:
        """The key of one image."""
        return self.records[index].key

    @cached_property
    def keys_sha256(self) -> str:
        """Which images these are; computed once, as every checkpoint states it."""
        return keys_sha256(record.key for record in self.records)


def join(
    images: str | Path | list[str | Path] | None, store: TokenStore, skip_missing: bool = False
) -> TokenisedImages:
    """Finds each image's tokens by its key; without `images`, those that the store holds beside its tokens.

    Images that encode-shards was told to skip are counted and left out. Raises DataError naming others that have no
    tokens, unless `skip_missing`; then they are counted and left out, too.
    Tokens whose image is not in `images` are not an error (training on some of the shards), but they are counted.
    """
    columns, within = [], []
    for name, shard in store.shards():
        columns.append((shard.keys, shard.tokens, shard.crops, shard.flips, shard.crc32))
        if images is None:
            within += store.images_of(name, shard)
    keys, tokens, crops, flips, crc32 = (np.concatenate(column) for column in zip(*columns, strict=True))
    row_of = {key: row for row, key in enumerate(keys)}
    if len(row_of) != len(keys):
        raise DataError(f"{store.path} holds {len(keys) - len(row_of)} keys twice; encode each image once.")
    skipped = {key for _, key, _ in store.skipped()}
    records = within if images is None else read_records(images, [] if skipped else None)
    if skipped:
        say(f"{len(store.skipped())} images were skipped when {store.path} was encoded; they are left out.")
        records = [record for record in records if record.key in row_of or record.key not in skipped]
    missing = [record.key for record in records if record.key not in row_of]
    if missing:
        named = f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        text = f"{len(missing)} of {len(records)} images have no tokens in {store.path}: {named}"
        if not skip_missing or len(missing) == len(records):
            raise DataError(f"{text}; encode them (mapet tokenize encode-shards) or --set data.skip_missing=true.")
        say(f"{text}; they are left out.")
        records = [record for record in records if record.key in row_of]
    if len(records) < len(keys):
        say(f"{len(keys) - len(records)} rows of {store.path} belong to images that were not given; they are not used.")
    # By key, so that an epoch's order does not depend on how images are spread over tars.
    records.sort(key=lambda record: record.key)
    rows = np.array([row_of[record.key] for record in records])
    return TokenisedImages(records, tokens[rows], crops[rows], flips[rows], crc32[rows])


def check_grid(store: TokenStore, model: ModelSettings) -> None:
    """UsageError, saying which sizes would fit, unless the model has one patch for each token."""
    rows, columns = store.grid
    side = model.image_size // model.patch_size
    if (rows, columns) == (side, side):
        return
    if rows != columns:
        raise UsageError(f"{store.path} has a {rows}x{columns} token grid; the model needs a square one.")
    fits = f"model.image_size={rows * model.patch_size} with model.patch_size={model.patch_size}"
    if model.image_size % rows == 0:
        fits += f", or model.patch_size={model.image_size // rows} with model.image_size={model.image_size}"
    raise UsageError(
        f"The model's grid is {side}x{side} (model.image_size {model.image_size}, model.patch_size {model.patch_size}) "
        f"and {store.path} has {rows}x{columns} tokens an image; these would fit: {fits}."
    )


@dataclass(frozen=True)
class LoadSample:
    """Loads the sample (epoch, image): a pure function of (seed, epoch, key)."""

    images: TokenisedImages
    settings: Settings

    def __call__(self, place: tuple[int, int]) -> dict[str, np.ndarray]:
        """pixels uint8 (3, S, S); order (N,) int64; tokens (N,) int64 in that order; draws (depth, 2) float32."""
        epoch, index = place
        record = self.images.records[index]
        view = view_of_epoch(self.images.tokens.shape[1], self.settings.train.seed, epoch, record.key)
        tokens = self.images.tokens[index, view]
        random = self._random("permutation", epoch, record)
        order = draw_permutation(self.settings.objective, len(tokens), random)
        return {
            "index": index,
            "pixels": self._pixels(record, index, view, epoch),
            "order": order,
            "tokens": tokens.reshape(-1)[order].astype(np.int64),
            "draws": self._random("drop path", epoch, record).random((self.settings.model.depth, 2), dtype=np.float32),
        }

    def _random(self, what: str, epoch: int, record: ImageRecord) -> np.random.Generator:
        return generator(self.settings.train.seed, what, epoch, record.key)

    def _pixels(self, record: ImageRecord, index: int, view: int, epoch: int) -> np.ndarray:
        content = read_bytes(record)
        if zlib.crc32(content) != self.images.crc32[index]:
            raise DataError(
                f"{record.path}: image {record.key!r} is not the one that was encoded (its CRC32 differs); "
                "restore the source or encode it again."
            )
        image = decode(content, f"{record.path}: image {record.key!r}")
        box = CropBox(*self.images.crops[index, view])
        size, data = self.settings.model.image_size, self.settings.data
        student = replay(image, box, bool(self.images.flips[index, view]), size, data.interpolation)
        if data.color_jitter:
            student = _jitter(student, data.color_jitter, self._random("jitter", epoch, record))
        return to_array(student)


def _jitter(image, strength: float, random: np.random.Generator):
    """Brightness, contrast and saturation by factors from [1 - strength, 1 + strength], in random order, no hue."""
    adjustments = (adjust_brightness, adjust_contrast, adjust_saturation)
    factors = random.uniform(1 - strength, 1 + strength, size=len(adjustments))
    for which in random.permutation(len(adjustments)):
        image = adjustments[which](image, factors[which])
    return image


def batch_places(count: int, batch_size: int, epochs: int, seed: int, parts: int, start: int) -> Iterator[list]:
    """Yields, from step `start` on, the (epoch, image) places of each of the `parts` parts of each batch.

    Each epoch visits the images in a new order, a pure function of (seed, epoch); what does not fill a batch at its
    end is left for the next epoch's order.
    """
    steps = count // batch_size
    for step in range(start, epochs * steps):
        epoch, within = divmod(step, steps)
        if within == 0 or step == start:
            order = generator(seed, "epoch", epoch).permutation(count)
        batch = order[within * batch_size : (within + 1) * batch_size]
        for part in np.split(batch, parts):
            yield [(epoch, int(index)) for index in part]
