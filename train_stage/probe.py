"""probe: are frozen features any good? A linear classifier and k nearest neighbours on them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize, one_hot

from ..shared.console import progress, results
from ..shared.devices import choose_device, choose_workers
from ..shared.errors import DataError
from ..shared.images import ImageRecord, open_source, read_image
from ..shared.loading import batches
from ..shared.views import Preprocess, center_view, to_array
from .interchange import load_weights
from .model import MaPeT

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}
_WEIGHT_DECAYS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_SHARE_TO_CHOOSE = 0.1
NEIGHBOURS, TEMPERATURE = 20, 0.07
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
        weights: a run, a checkpoint folder, or a published `.pth.tar`.
        images, val: labelled training and validation images.
        random_init: also probe the same model with fresh weights of the run's seed.
        pixels: also probe the raw pixels, averaged to 32x32.
        batch_size, workers, device: how to run.

    Raises:
        DataError if the weights cannot be read or images have no labels.
    """
    device = choose_device(device)
    model, about = load_weights(weights)
    sources = [_labelled(source) for source in (images, val)]
    preprocess = _preprocess(model, about)
    views = [_View(records, preprocess) for records in sources]
    labels = [torch.tensor([record.label for record in records]) for records in sources]
    rows: list[tuple[str, Callable[[Tensor], Tensor]]] = [("pre-trained", model.features)]
    if random_init:
        torch.manual_seed(about.get("seed", 0))
        rows.append(("random init", MaPeT(model.shape).to(device).eval().features))
    if pixels:
        rows.append((f"pixels {PIXELS}x{PIXELS}", lambda scaled: adaptive_avg_pool2d(scaled, PIXELS).flatten(1)))
    model.to(device).eval()
    found = _extract(views, [function for _, function in rows], batch_size, choose_workers(workers, device), device)
    outcome = [
        ProbeResult(name, linear_probe(train, labels[0], test, labels[1]), knn(train, labels[0], test, labels[1]))
        for (name, _), (train, test) in zip(rows, found, strict=True)
    ]
    _show(outcome, labels)
    return outcome


def _labelled(source: str | Path | Sequence[str | Path]) -> list[ImageRecord]:
    records = [record for shard in open_source(source) for record in shard.records]
    unlabelled = sum(record.label is None for record in records)
    if unlabelled:
        raise DataError(
            f"{unlabelled} of the {len(records)} images in {source} have no label; a probe needs .cls members in tars, "
            "or class folders."
        )
    return records


def _preprocess(model: MaPeT, about: dict[str, Any]) -> Preprocess:
    known = {name: about.get(name, default) for name, default in _IMAGENET.items()}
    size = model.shape.image_size
    return Preprocess(
        image_size=size,
        resize="shortest",
        resize_size=size,
        interpolation=known["interpolation"],
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
    )


@dataclass(frozen=True)
class _View:
    records: list[ImageRecord]
    preprocess: Preprocess

    def __call__(self, index: int) -> dict[str, Any]:
        return {"pixels": to_array(center_view(read_image(self.records[index])[0], self.preprocess))}


@torch.no_grad()
def _extract(
    views: list[_View], functions: list[Callable[[Tensor], Tensor]], batch_size: int, workers: int, device: str
) -> list[list[Tensor]]:
    """For each function, its features (n, dim) float32 on `device` of the training and of the validation images."""
    with progress("extracting features", sum(len(view.records) for view in views)) as advance:
        passes = []
        for view in views:
            parts = [
                [function(scaled) for function in functions]
                for scaled in _scaled(view, batch_size, workers, device, advance)
            ]
            passes.append([torch.cat(column) for column in zip(*parts, strict=True)])
    return [list(pair) for pair in zip(*passes, strict=True)]


def _scaled(view: _View, batch_size: int, workers: int, device: str, advance: Callable) -> Iterator[Tensor]:
    count = len(view.records)
    mean = torch.tensor(view.preprocess.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(view.preprocess.std, device=device).view(1, 3, 1, 1)
    indices = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    for batch in batches(view, indices, count, workers):
        yield batch["pixels"].to(device).float().div_(255).sub_(mean).div_(std)
        advance(len(batch["pixels"]))


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Top-1 accuracy of multinomial logistic regression on features (n, dim), labels (n,) int64.

    Features are standardised by the training set. The weight decay that does best on a tenth of the training images
    is used on all of them.
    """
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    labels, test_labels = labels.to(train.device), test_labels.to(train.device)
    classes = int(max(labels.max(), test_labels.max())) + 1
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    held_out = max(1, int(len(train) * _SHARE_TO_CHOOSE))
    choose, fit = shuffled[:held_out], shuffled[held_out:]
    scores, start = {}, None
    for decay in sorted(_WEIGHT_DECAYS, reverse=True):
        start = _logistic_regression(train[fit], labels[fit], classes, decay, start)
        scores[decay] = _accuracy(start, train[choose], labels[choose])
    best = max(scores, key=scores.__getitem__)
    return _accuracy(_logistic_regression(train, labels, classes, best, start), test, test_labels)


Classifier = tuple[Tensor, Tensor]


def _logistic_regression(
    features: Tensor, labels: Tensor, classes: int, decay: float, start: Classifier | None
) -> Classifier:
    """Weights (dim, classes) and bias (classes,) that minimise cross-entropy + decay / 2 * |weights|^2."""
    blank = (features.new_zeros(features.shape[1], classes), features.new_zeros(classes))
    weight, bias = (tensor.clone().requires_grad_() for tensor in start or blank)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(features @ weight + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _accuracy(classifier: Classifier, features: Tensor, labels: Tensor) -> float:
    weight, bias = classifier
    return ((features @ weight + bias).argmax(1) == labels).float().mean().item()


def knn(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Top-1 accuracy of the weighted vote of the 20 nearest training images by cosine of centred features."""
    train, test = (normalize(features - train.mean(0), dim=1) for features in (train, test))
    labels, test_labels = labels.to(train.device), test_labels.to(train.device)
    votes_of = one_hot(labels).float()
    right = 0
    for some, truth in zip(test.split(1024), test_labels.split(1024), strict=True):
        similarity, nearest = (some @ train.T).topk(min(NEIGHBOURS, len(train)), dim=1)
        votes = (similarity / TEMPERATURE).exp()[:, :, None] * votes_of[nearest]
        right += int((votes.sum(1).argmax(1) == truth).sum())
    return right / len(test)


def _show(outcome: list[ProbeResult], labels: list[Tensor]) -> None:
    grid = Table(title=f"Frozen features: top-1 on {len(labels[1]):,} images of {len(labels[1].unique())} classes")
    for heading in ("features", "linear probe", "k-NN"):
        grid.add_column(heading, justify="left" if heading == "features" else "right")
    for result in outcome:
        grid.add_row(result.features, f"{result.linear:.1%}", f"{result.knn:.1%}")
    results.print(grid)
