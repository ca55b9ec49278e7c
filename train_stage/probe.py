"""probe: are frozen features any good? A linear classifier and k nearest neighbours on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize, one_hot

from ..shared.errors import DataError
from ..shared.images.records import ImageRecord
from ..shared.images.sources import read_records
from ..shared.images.views import Preprocess
from ..shared.randomness import generator
from ..shared.runtime.console import progress, results
from ..shared.runtime.devices import choose_device, choose_workers
from .features import embed, normalised_views
from .model.mapet import MaPeT
from .settings import Settings
from .weights.read import load_weights
from .weights.weights import Input, Weights

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
    sources = [_labelled(source) for source in (images, val)]
    labels = [torch.tensor([record.label for record in records]) for records in sources]
    rows = [("pre-trained", _pooled(found, device))]
    if random_init:
        rows.append(("random init", _pooled(_fresh(found), device)))
    if pixels:
        rows.append((f"pixels {PIXELS}x{PIXELS}", lambda shown: adaptive_avg_pool2d(shown, PIXELS).flatten(1)))
    functions = [function for _, function in rows]
    workers = choose_workers(workers, device)
    with progress("extracting features", sum(map(len, sources))) as advance:
        passes = _extract(sources, found.preprocess, functions, batch_size, workers, device, advance)
    outcome = [
        ProbeResult(name, linear_probe(train, labels[0], test, labels[1]), knn(train, labels[0], test, labels[1]))
        for (name, _), (train, test) in zip(rows, passes, strict=True)
    ]
    _show(outcome, labels)
    return outcome


class RunProbe:
    """Probes a run as it goes on: k-NN, and the linear probe if wanted, on seeded subsets of two labelled sets."""

    def __init__(self, settings: Settings, device: str):
        """Raises DataError if the sets cannot be read or have no labels."""
        self._settings, self._device = settings, device
        chosen = settings.probe
        sizes = (chosen.max_images, max(chosen.max_images // 4, 1))
        pairs = zip((chosen.images, chosen.val), sizes, strict=True)
        self._sources = [_subset(_labelled(source), size) for source, size in pairs]

    def measure(self, tensors: dict[str, Tensor], k: int) -> dict[str, float]:
        """Top-1 accuracies in [0, 1] of features of these weights (published names), as "knn" and "linear"."""
        settings, data = self._settings, self._settings.data
        shape, seen = settings.model.shape(k), Input(tuple(data.mean), tuple(data.std), data.interpolation)
        cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        weights = Weights(Path("the run's weights"), shape, cpu, seen, settings.train.seed)
        labels = [torch.tensor([record.label for record in records]) for records in self._sources]
        workers = choose_workers(data.workers, self._device)
        functions = [_pooled(weights, self._device)]
        ((train, test),) = _extract(self._sources, weights.preprocess, functions, 128, workers, self._device)
        found = {"knn": knn(train, labels[0], test, labels[1])}
        if settings.probe.linear:
            found["linear"] = linear_probe(train, labels[0], test, labels[1])
        return found


def _subset(records: list[ImageRecord], size: int) -> list[ImageRecord]:
    """At most `size` of the records, drawn by key, in their order."""
    drawn = sorted(range(len(records)), key=lambda at: generator("probe", records[at].key).random())[:size]
    return [records[at] for at in sorted(drawn)]


def _pooled(weights: Weights, device: str) -> Callable[[Tensor], Tensor]:
    model = weights.vit().to(device)
    return lambda shown: embed(model, shown)[0]


def _fresh(weights: Weights) -> Weights:
    """The same model as its seed starts it."""
    torch.manual_seed(weights.seed)
    shape = replace(weights.shape, k=max(weights.shape.k, 1))
    return replace(weights, shape=shape, tensors=MaPeT(shape).state_dict())


def _labelled(source: str | Path | Sequence[str | Path]) -> list[ImageRecord]:
    records = read_records(source)
    unlabelled = sum(record.label is None for record in records)
    if unlabelled:
        raise DataError(
            f"{unlabelled} of the {len(records)} images in {source} have no label; a probe needs .cls members in tars, "
            "or class folders."
        )
    return records


@torch.no_grad()
def _extract(
    sources: list[list[ImageRecord]],
    preprocess: Preprocess,
    functions: list[Callable[[Tensor], Tensor]],
    batch_size: int,
    workers: int,
    device: str,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[Tensor]]:
    """For each function, its features (n, dim) float32 on `device` of the training and of the validation images."""
    passes = []
    for records in sources:
        parts = []
        for shown in normalised_views(records, preprocess, batch_size, workers, device):
            parts.append([function(shown) for function in functions])
            advance(len(shown))
        passes.append([torch.cat(column) for column in zip(*parts, strict=True)])
    return [list(pair) for pair in zip(*passes, strict=True)]


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
