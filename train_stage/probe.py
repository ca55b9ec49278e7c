"""probe: are frozen features any good? A linear classifier and k nearest neighbours on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..shared.runtime.console import progress, results
from ..shared.runtime.devices import choose_device, choose_workers
from .evaluation.embed import extract_features, fresh_weights, pooled_features
from .evaluation.knn import knn
from .evaluation.labelled import labelled_images
from .evaluation.linear_probe import linear_probe
from .weights.read import load_weights

PIXELS = 32


@dataclass(frozen=True)
class ProbeResult:
    """Top-1 accuracies in [0, 1] on the validation images."""

    features: str
    linear: float
    knn: float


def probe(
    weights: str | Path,
    images: str | Path | Sequence[str | Path],
    val: str | Path | Sequence[str | Path],
    *,
    random_init: bool = False,
    pixels: bool = False,
    batch_size: int = 128,
    workers: int | None = None,
    device: str = "auto",
) -> list[ProbeResult]:
    """Linear probe and k-NN on frozen features (mean over patches of the final norm's output).

    The linear probe is multinomial logistic regression on standardised features (L-BFGS), its weight decay chosen on
    a tenth of the training images. k-NN votes by cosine of features centred by the training mean (SimpleShot, arXiv
    1911.04623), with k = 20 and temperature 0.07 (DINO, arXiv 2104.14294).

    Args:
        weights: a run, a checkpoint folder, an imported or exported folder, or a published `.pth.tar`.
        images, val: labelled training and validation images.
        random_init: also probe the same model with fresh weights of the run's seed.
        pixels: also probe the raw pixels, averaged to 32x32.
        batch_size, workers, device: how to run.

    Raises:
        DataError if the weights cannot be read or images have no labels.
    """
    device = choose_device(device)
    found = load_weights(weights)
    sources = [labelled_images(source) for source in (images, val)]
    labels = [torch.tensor([record.label for record in records]) for records in sources]
    rows = [("pre-trained", pooled_features(found, device))]
    if random_init:
        rows.append(("random init", pooled_features(fresh_weights(found), device)))
    if pixels:
        rows.append((f"pixels {PIXELS}x{PIXELS}", lambda shown: adaptive_avg_pool2d(shown, PIXELS).flatten(1)))
    functions = [function for _, function in rows]
    workers = choose_workers(workers, device)
    with progress("extracting features", sum(map(len, sources))) as advance:
        passes = extract_features(sources, found.preprocess, functions, batch_size, workers, device, advance)
    outcome = [
        ProbeResult(name, linear_probe(train, labels[0], test, labels[1]), knn(train, labels[0], test, labels[1]))
        for (name, _), (train, test) in zip(rows, passes, strict=True)
    ]
    _show(outcome, labels)
    return outcome


def _show(outcome: list[ProbeResult], labels: list[Tensor]) -> None:
    grid = Table(title=f"Frozen features: top-1 on {len(labels[1]):,} images of {len(labels[1].unique())} classes")
    for heading in ("features", "linear probe", "k-NN"):
        grid.add_column(heading, justify="left" if heading == "features" else "right")
    for result in outcome:
        grid.add_row(result.features, f"{result.linear:.1%}", f"{result.knn:.1%}")
    results.print(grid)
