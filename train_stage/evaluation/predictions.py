"""What runs predict for images that they may never have seen, beside the true tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...shared.errors import DataError, FingerprintMismatch, UsageError
from ...shared.images.normalise import Normalise
from ...shared.images.views import to_array
from ...shared.randomness import generator
from ...shared.report.pictures import data_uri
from ...shared.runtime.console import progress
from ...shared.runtime.devices import choose_device
from ...shared.tokens.rows import ShardRows
from ...shared.tokens.store import TokenStore
from ...shared.tokens.stored_views import StoredViews, by_shard, choose_images
from ..model.mapet import MaPeT
from ..objectives.layouts import make_layout
from ..objectives.permutations import draw_permutation
from ..settings import ObjectiveSettings, resolve
from ..weights.read import load_weights
from ..weights.weights import Weights

IMAGES, SHOWN = 256, 24
"""How many images are predicted at most, and how many of them are shown."""
_BATCH = 32
_SIDE = 224
GIVEN = -1
"""Stands for the prediction of a patch that was given."""


@dataclass(frozen=True)
class _Run:
    """A run whose newest checkpoint is asked."""

    weights: Weights
    model: MaPeT
    objective: ObjectiveSettings

    @property
    def visible(self) -> int:
        """How many patches are given: as at the end of training."""
        patches, asked = self.weights.shape.patches, self.objective
        if asked.name == "mim":
            return patches - asked.masked(patches)
        return asked.visible if asked.visible_to is None else asked.visible_to


def predict(folders: Sequence[Path], tokens: str, images: str | None, seed: int, device: str) -> dict[str, Any]:
    """What the newest checkpoint of each run predicts for at most 256 images of the store `tokens`, drawn by `seed`.

    Each image is predicted once, with a permutation drawn by (seed, key), all hidden patches at once. Returns plain
    JSON values: k, grid, `images` (24 of them with key, picture and tokens in raster order), and for each run
    `accuracy`, `patches` (how many were predicted), `by_position` (H lists of W shares, None where nothing was
    predicted) and `images` (predicted tokens in raster order, -1 where the patch was given).

    Raises FingerprintMismatch if the tokens were made with another codebook than a run's, UsageError if their grid is
    not the model's or no images are at hand, DataError for a run without a checkpoint.
    """
    device, store = choose_device(device), TokenStore(tokens)
    runs = [_open(folder, store, device) for folder in folders]
    views = StoredViews(store, images)
    if not views.shards:
        raise UsageError(f"{store.path} holds no images, only their tokens; give --images, too.")
    places = choose_images(store, views.shards, IMAGES, seed)
    view_of = {(place.shard, place.row): place.view for place in places}
    shown_at = {(place.shard, place.row) for place in places[:: -(-len(places) // SHOWN)]}
    tokens, predicted, shown = [], [[] for _ in runs], {}
    with progress("predicting", len(places)) as advance:
        for shard, rows, chosen in by_shard(store, view_of):
            for start in range(0, len(chosen), _BATCH):
                batch = [(row, view_of[shard, row]) for row in chosen[start : start + _BATCH]]
                for place in ((row, view) for row, view in batch if (shard, row) in shown_at):
                    shown[len(tokens) + batch.index(place)] = _shown(views, shard, rows, *place)
                tokens += [rows.tokens[place].reshape(-1) for place in batch]
                for run, found in zip(runs, predicted, strict=True):
                    found += [*_predicted(run, views, shard, rows, batch, seed, device)]
                advance(len(batch))
    at = list(shown)
    return {
        "k": store.k,
        "grid": list(store.grid),
        "all_images": len(places),
        "images": list(shown.values()),
        "runs": [_outcome(np.stack(tokens), np.stack(found), at, store.grid) for found in predicted],
    }


def _open(folder: Path, store: TokenStore, device: str) -> _Run:
    weights = load_weights(folder)
    objective = resolve(folder / "settings.yaml").objective
    made_with = _codebook_of(folder)
    if made_with != store.fingerprint:
        raise FingerprintMismatch(
            f"{store.path} was made with codebook {store.fingerprint[:12]}, and {folder} trained on {made_with[:12]}; "
            "give tokens of the same codebook."
        )
    if store.grid != (weights.grid, weights.grid):
        rows, columns = store.grid
        raise UsageError(
            f"{store.path} has {rows}x{columns} tokens an image, and {folder} predicts {weights.grid}x{weights.grid}."
        )
    return _Run(weights, weights.mapet().to(device).eval(), objective)


def _codebook_of(folder: Path) -> str:
    try:
        return str(json.loads((folder / "run.json").read_text())["codebook_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'run.json'} does not name the run's codebook ({error}).") from None


@torch.no_grad()
def _predicted(
    run: _Run,
    views: StoredViews,
    shard: str,
    rows: ShardRows,
    batch: Sequence[tuple[int, int]],
    seed: int,
    device: str,
) -> np.ndarray:
    """What is predicted for the images `batch` (row, view), (B, N) int64 in raster order, `GIVEN` where it was."""
    shape, seen = run.weights.shape, run.weights.input
    pixels = [to_array(views.view(shard, rows, *place, shape.image_size, seen.interpolation)) for place in batch]
    order = np.stack(
        [
            draw_permutation(run.objective, run.weights.grid, generator(seed, "report", rows.keys[row]))
            for row, _ in batch
        ]
    )
    shown = Normalise(seen.mean, seen.std, device)(torch.from_numpy(np.stack(pixels)))
    layout = make_layout(run.objective.name, shape.patches, run.visible, device=device)
    codes = run.model(shown, torch.from_numpy(order).to(device), layout).argmax(-1).cpu().numpy()
    predicted = np.full(order.shape, GIVEN)
    np.put_along_axis(predicted, order[:, run.visible :][:, layout.ranks.cpu().numpy()], codes, axis=1)
    return predicted


def _outcome(tokens: np.ndarray, predicted: np.ndarray, shown: list[int], grid: tuple[int, int]) -> dict[str, Any]:
    """What one run got right, of tokens and predictions (n, N), and what it predicts for the images `shown`."""
    right, asked = (tokens == predicted).sum(0), (predicted != GIVEN).sum(0)
    shares = [hit / all_ if all_ else None for hit, all_ in zip(right.tolist(), asked.tolist(), strict=True)]
    return {
        "accuracy": float(right.sum() / max(asked.sum(), 1)),
        "patches": int(asked.sum()),
        "by_position": [shares[start : start + grid[1]] for start in range(0, len(shares), grid[1])],
        "images": predicted[shown].tolist(),
    }


def _shown(views: StoredViews, shard: str, rows: ShardRows, row: int, view: int) -> dict[str, Any]:
    return {
        "key": str(rows.keys[row]),
        "picture": data_uri(views.view(shard, rows, row, view, _SIDE)),
        "tokens": rows.tokens[row, view].reshape(-1).tolist(),
    }
