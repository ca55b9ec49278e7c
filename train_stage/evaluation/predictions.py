"""Predicts the tokens of images with the newest checkpoints of runs, for comparison with the true tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

from ...shared.artifacts.codes import Tokens
from ...shared.artifacts.fields import Text, read_json
from ...shared.errors import DataError, FingerprintMismatch, UsageError
from ...shared.images.normalise import Normalise
from ...shared.images.views import to_array
from ...shared.randomness import generator
from ...shared.report.pictures import data_uri
from ...shared.runtime.console import progress
from ...shared.runtime.devices import choose_device
from ...shared.sources.sources import Images
from ...shared.tokens.rows import ShardRows
from ...shared.tokens.store import TokenStore
from ...shared.tokens.stored_views import StoredViews, by_shard, choose_images
from ..model.mapet import MaPeT
from ..objectives.layouts import make_layout
from ..objectives.permutations import draw_permutation
from ..settings import FEATURES, ObjectiveSettings, resolve
from ..weights.read import load_weights
from ..weights.weights import Weights

MOST_IMAGES, MOST_PICTURES = 256, 24
"""How many images are predicted at most, and how many of them come with a picture."""
NOT_PREDICTED = -1
"""Stands in an image's predictions for a patch that was visible."""
_BATCH = 32
_PICTURE_SIDE = 224


class _RunRecord(Struct):
    """run.json, as far as it is read here."""

    codebook_fingerprint: Text


@dataclass(frozen=True)
class _Run:
    """A run, with the weights of its newest checkpoint."""

    weights: Weights
    model: MaPeT
    objective: ObjectiveSettings

    @property
    def visible(self) -> int:
        """How many patches are visible at the end of training."""
        patches, objective = self.weights.shape.patches, self.objective
        if objective.name == "mim":
            return patches - objective.masked(patches)
        return objective.visible if objective.visible_to is None else objective.visible_to


@dataclass(frozen=True)
class _Batch:
    """Some views of one shard of the store."""

    shard: str
    rows: ShardRows
    places: Sequence[tuple[int, int]]
    """(row, view) of each."""

    @property
    def keys(self) -> list[str]:
        return [str(self.rows.keys[row]) for row, _ in self.places]

    @property
    def tokens(self) -> Tokens:
        """(B, N), in raster order."""
        return np.stack([self.rows.tokens[place].reshape(-1) for place in self.places])


@dataclass
class _Collected:
    """The results of all batches."""

    tokens: list[Tokens] = field(default_factory=list)
    """The true tokens of each batch, (B, N)."""
    predictions: list[list[NDArray[np.int64]]] = field(default_factory=list)
    """The predictions of each batch by each run, (B, N)."""
    pictures: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The images that come with a picture, by their number."""


def predict(folders: Sequence[Path], tokens: str, images: Images | None, seed: int, device: str) -> dict[str, Any]:
    """Predicts the tokens of at most 256 images of a store with the newest checkpoint of each run.

    Each image is predicted once, with a permutation drawn by (seed, key), all hidden patches at once.

    Args:
        folders: the runs.
        tokens: the token store; images are drawn from it by `seed`.
        images: the source of the store's images; None if the store holds them.
        seed: of the images and the permutations.
        device: "auto", "cpu" or "cuda".

    Returns:
        Plain JSON values: `k`, `grid`, `all_images` (how many were predicted), `images` (at most 24 of them with key,
        picture and tokens in raster order), and `runs`. A run has `accuracy`, `patches` (how many were predicted),
        `by_position` (H lists of W accuracies, None where nothing was predicted) and `images` (predicted tokens in
        raster order, -1 where the patch was visible).

    Raises:
        FingerprintMismatch if the tokens were made with another codebook than a run's; UsageError if their grid is not
        the model's or the images are not at hand; DataError for a run without a checkpoint.
    """
    device_name, store = choose_device(device), TokenStore(tokens)
    runs = [_open(folder, store, device_name) for folder in folders]
    views = StoredViews(store, images)
    if not views.shards:
        raise UsageError(f"{store.path} holds no images, only their tokens; give --images, too.")
    places = choose_images(store, views.shards, MOST_IMAGES, seed)
    with_picture = {(place.shard, place.row) for place in places[:: -(-len(places) // MOST_PICTURES)]}
    collected, count = _Collected(), 0
    with progress("predicting", len(places)) as advance:
        for batch in _batches(store, {(place.shard, place.row): place.view for place in places}):
            for number, place in enumerate(batch.places, start=count):
                if (batch.shard, place[0]) in with_picture:
                    collected.pictures[number] = _picture(views, batch.shard, batch.rows, *place)
            collected.tokens.append(batch.tokens)
            collected.predictions.append([_predict_batch(run, views, batch, seed, device_name) for run in runs])
            count += len(batch.places)
            advance(len(batch.places))
    return {
        "k": store.k,
        "grid": list(store.grid),
        "all_images": len(places),
        "images": list(collected.pictures.values()),
        "runs": _outcomes(collected, store.grid),
    }


def _batches(store: TokenStore, view_of: dict[tuple[str, int], int]) -> Iterator[_Batch]:
    """The views in batches of one shard each; every shard is read once."""
    for shard, rows, numbers in by_shard(store, view_of):
        for start in range(0, len(numbers), _BATCH):
            places = [(row, view_of[shard, row]) for row in numbers[start : start + _BATCH]]
            yield _Batch(shard, rows, places)


def _open(folder: Path, store: TokenStore, device: str) -> _Run:
    weights = load_weights(folder)
    try:
        objective = resolve(folder / "settings.yaml").objective
    except UsageError as error:
        reason = str(error).replace(f"--recipe {folder / 'settings.yaml'}", "")
        raise DataError(f"{folder / 'settings.yaml'} does not hold a run's settings ({reason.strip(' :')})") from None
    if objective.target == FEATURES:
        raise UsageError(
            f"{folder} predicts the features of a tower (objective.target=features), not tokens; leave --tokens out."
        )
    fingerprint = _codebook_of(folder)
    if fingerprint != store.fingerprint:
        raise FingerprintMismatch(
            f"{store.path} was made with codebook {store.fingerprint[:12]}, and {folder} trained on "
            f"{fingerprint[:12]}; give tokens of the same codebook."
        )
    if store.k != weights.shape.k:
        raise DataError(
            f"{store.path} states K = {store.k}, and {folder} predicts K = {weights.shape.k} with the same codebook; "
            "restore the store's manifest or make it again."
        )
    if store.grid != (weights.grid, weights.grid):
        rows, columns = store.grid
        raise UsageError(
            f"{store.path} has {rows}x{columns} tokens per image, and {folder} predicts {weights.grid}x{weights.grid}; "
            "give tokens of the model's grid."
        )
    return _Run(weights, weights.mapet().to(device).eval(), objective)


def _codebook_of(folder: Path) -> str:
    """The fingerprint of the codebook whose tokens a run was trained on."""
    return read_json(
        folder / "run.json", _RunRecord, "the record of a run that names its codebook"
    ).codebook_fingerprint


@torch.no_grad()
def _predict_batch(run: _Run, views: StoredViews, batch: _Batch, seed: int, device: str) -> NDArray[np.int64]:
    """Predicted tokens (B, N) in raster order, `NOT_PREDICTED` where the patch is visible."""
    shape, model_input, grid = run.weights.shape, run.weights.input, run.weights.grid
    pixels = [
        to_array(views.view(batch.shard, batch.rows, row, view, shape.image_size, model_input.interpolation))
        for row, view in batch.places
    ]
    order = np.stack([draw_permutation(run.objective, grid, generator(seed, "report", key)) for key in batch.keys])
    normalise = Normalise(model_input.mean, model_input.std, device)
    layout = make_layout(run.objective.name, shape.patches, run.visible, device=device)
    logits = run.model(normalise(torch.from_numpy(np.stack(pixels))), torch.from_numpy(order).to(device), layout)
    patches = order[:, run.visible :][:, layout.ranks.cpu().numpy()]
    predicted = np.full(order.shape, NOT_PREDICTED)
    np.put_along_axis(predicted, patches, logits.argmax(-1).cpu().numpy(), axis=1)
    return predicted


def _picture(views: StoredViews, shard: str, rows: ShardRows, row: int, view: int) -> dict[str, Any]:
    return {
        "key": str(rows.keys[row]),
        "picture": data_uri(views.view(shard, rows, row, view, _PICTURE_SIDE)),
        "tokens": rows.tokens[row, view].reshape(-1).tolist(),
    }


def _outcomes(collected: _Collected, grid: tuple[int, int]) -> list[dict[str, Any]]:
    """For each run, its accuracy and its predictions for the images with a picture."""
    tokens, numbers = np.concatenate(collected.tokens), list(collected.pictures)
    by_run = zip(*collected.predictions, strict=True)
    return [_outcome(tokens, np.concatenate(batches), numbers, grid) for batches in by_run]


def _outcome(tokens: Tokens, predicted: NDArray[np.int64], numbers: list[int], grid: tuple[int, int]) -> dict[str, Any]:
    """One run's accuracy over tokens and predictions (n, N), and its predictions for the images `numbers`."""
    correct, count = (tokens == predicted).sum(0), (predicted != NOT_PREDICTED).sum(0)
    accuracies = [hits / of if of else None for hits, of in zip(correct.tolist(), count.tolist(), strict=True)]
    return {
        "accuracy": float(correct.sum() / max(count.sum(), 1)),
        "patches": int(count.sum()),
        "by_position": [accuracies[start : start + grid[1]] for start in range(0, len(accuracies), grid[1])],
        "images": predicted[numbers].tolist(),
    }
