"""bench: decode, loader, tower, assignment, k-means and step on this machine, each beside its bare reference."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..quickstart.demo import TOWER
from ..shared.errors import UsageError
from ..shared.runtime.console import results, say, working
from ..shared.runtime.devices import choose_device, choose_workers, peak_flops, refuse_many_processes
from ..shared.runtime.faiss_build import faiss_gpus, import_faiss
from ..shared.sources.records import ImageRecord
from ..tokenize_stage.kmeans.train import KMeansSettings
from ..tokenize_stage.towers.opening import open_tower
from ..tokenize_stage.towers.pixel_patches import NAME as PIXELS
from ..tokenize_stage.towers.tower import TowerSettings
from ..train_stage.data.batch import Batch, LoadBatch
from ..train_stage.data.dataset import TokenisedImages
from ..train_stage.settings import TOKENS, Settings, resolve
from ..train_stage.tasks.pretraining import refuse_other_target
from .images import one_tar, tokenised
from .loading import Decoding, Loading
from .rates import Comparison, Row, compare, in_turns, timed
from .tokenizing import Encoding, clustering, ready_pixels, with_random_codes
from .training import Steps, matrix_product
from .verdict import Machine, Verdict, of_tokenizing, of_training

_BATCH, _BATCH_ON_GPU, _MOST_OF_TOWER = 4, 256, 64
_PARTS = 6
"""Parts that share the seconds equally."""
_OF_ITS_OWN = ("train.batch_size", "data.workers")


@dataclass(frozen=True)
class Throughput:
    """What `bench` measured on this machine."""

    about: dict[str, Any]
    """Device, cores, threads, workers, batch size, images, tower, model, precision."""
    rows: list[Row]
    training: Verdict
    tokenizing: Verdict
    kmeans: str
    """k-means in a sentence."""

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            **self.about,
            "rows": [row.to_json() for row in self.rows],
            "bounds": {"training": self.training.bound, "tokenizing": self.tokenizing.bound},
            "verdict": self.sentences,
        }

    @property
    def sentences(self) -> list[str]:
        """The verdict: what bounds training and tokenizing here, and what to change."""
        return [*self.training.sentences, *self.tokenizing.sentences, self.kmeans]


def bench(
    *,
    images: str | Path | None = None,
    tower: str | None = None,
    recipe: str | Path = "vit-tiny-16",
    overrides: Sequence[str] = (),
    k: int = 8192,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    seconds: float = 20.0,
) -> Throughput:
    """Measures tokenizing and training on this machine, part by part beside bare libraries, and says what bounds each.

    Nothing is written and nothing is downloaded, except for a tower hf-hub:ID. Ours and the reference take turns, and a
    ratio is the median over the rounds.

    Args:
        images: A tar, a folder, or a pattern of tars; at most 256 images of its first shard are used (default: 32
            drawings of 432 x 432 pixels).
        tower: As in build-codebook; the weights of open_clip and timm models are random, which takes the same time
            (default: the small tower of the demo).
        recipe: Name of a shipped recipe, or a YAML file: the model that is trained.
        overrides: A setting, such as execution.compile=true; repeat for more.
        k: Codes that patches are assigned to and that the model predicts.
        batch_size: Images per training step; the tower takes at most 64 of them at once (default: 4 on the CPU, 256 on
            CUDA).
        workers: Processes that decode images (default: 0 on the CPU, up to 16 on CUDA).
        device: auto, cpu or cuda.
        seconds: About how long all measurements take. Each has at least three rounds; preparations come on top.

    Returns:
        Rates, ratios, and what bounds training and tokenizing.

    Raises:
        DataError: An image cannot be read, or the weights of the tower are missing.
        UsageError: An option or a setting is invalid.
    """
    refuse_many_processes()
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--seconds {seconds:g} must be a positive number.")
    KMeansSettings(k=k)  # refuses a K that no codebook has
    import_faiss()
    device = choose_device(device)
    size = batch_size or (_BATCH_ON_GPU if device == "cuda" else _BATCH)
    settings = _settings(recipe, overrides, size)
    count = choose_workers(workers, device)
    with tempfile.TemporaryDirectory(prefix="mapet-bench-") as folder:
        say("preparing images and tokens ...")
        shard = one_tar(images, Path(folder))
        joined = tokenised(shard, settings.model, Path(folder))
        share = seconds / _PARTS
        loading = _loading_rows(joined, settings, count, share)
        name, records = tower or f"local-dir:{TOWER}", shard.index()
        tokenizing = _tokenizing_rows(name, records, k, min(size, _MOST_OF_TOWER), count, device, share)
        training = _training_rows(joined, settings, k, device, share)
    rows = {row.part: row for row in (*loading, *tokenizing, *training)}
    precision = settings.train.precision_on(device)
    machine = _machine(rows, device, count, precision, settings.execution.compile)
    about = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cores": machine.cores,
        "threads": torch.get_num_threads(),
        "workers": count,
        "batch_size": size,
        "images": str(images) if images else "drawings",
        "tower": tower or "the demo's",
        "model": f"{settings.model.name or 'ViT'}, {settings.model.image_size} pixels, K = {k}",
        "precision": precision,
        "compiled": settings.execution.compile,
        "share_of_peak": _share_of_peak(rows["step, limit"], device, precision),
    }
    kmeans = f"k-means runs at {rows['k-means'].rates.ratio:.2f} of bare FAISS."
    return Throughput(about, list(rows.values()), of_training(machine), of_tokenizing(machine), kmeans)


def _settings(recipe: str | Path, overrides: Sequence[str], batch_size: int) -> Settings:
    for override in overrides:
        key = override.partition("=")[0]
        if key in _OF_ITS_OWN:
            option = key.partition(".")[2].replace("_", "-")
            raise UsageError(f"--set {key} has an option of its own here; give --{option}.")
    settings = resolve(recipe, [*overrides, f"train.batch_size={batch_size}"])
    refuse_other_target(settings, TOKENS)
    return settings


def _loading_rows(images: TokenisedImages, settings: Settings, workers: int, seconds: float) -> list[Row]:
    decoding, loading = Decoding(images), Loading(images, settings, workers)
    with working("measuring the decoder"):
        decode = compare(timed(decoding.ours, len(images)), timed(decoding.bare, len(images)), seconds)
    with working("measuring the training loader"):
        load = compare(loading.ours, loading.bare, seconds)
    return [
        Row("decode", "simplejpeg or Pillow, one process", "images/s", decode),
        Row("loader", f"decode, crop and resize, {workers} workers", "images/s", load),
    ]


def _tokenizing_rows(
    name: str, records: Sequence[ImageRecord], k: int, batch_size: int, workers: int, device: str, seconds: float
) -> list[Row]:
    own_weights = name.startswith(("local-dir:", "hf-hub:", PIXELS))
    with working(f"opening {name}"):
        tower = open_tower(TowerSettings(name, None if own_weights else "none"), device)
        repeated = [records[place % len(records)] for place in range(batch_size)]
        pixels = ready_pixels(repeated, tower.preprocess)
        tokenizer = with_random_codes(tower, k, pixels[:16])
        encoding = Encoding(tokenizer, records, pixels, workers)
    with working("measuring the tower"):
        encode = compare(encoding.encode, timed(encoding.forward, batch_size), seconds)
    with working("measuring the assignment"):
        features, centroids = encoding.features(), tokenizer.codebook.centroids
        knn, here = import_faiss().knn, features.cpu().contiguous().numpy()
        assign = compare(
            timed(lambda: tokenizer.tokens(features), batch_size),
            timed(lambda: knn(here, centroids, 1), batch_size),
            seconds,
        )
    with working("measuring k-means"):
        rows = clustering(tower.dim)
        kmeans = compare(timed(rows.ours, rows.distances / 1e6), timed(rows.bare, rows.distances / 1e6), seconds)
    return [
        Row("tower", "the tower alone on ready tensors", "images/s", encode),
        Row("assignment", "faiss.knn on the CPU", "images/s", assign),
        Row("k-means", "faiss.Kmeans", "M distances/s", kmeans),
    ]


def _training_rows(images: TokenisedImages, settings: Settings, k: int, device: str, seconds: float) -> list[Row]:
    size, precision = settings.train.batch_size, settings.train.precision_on(device)
    batch = Batch(**LoadBatch(images, settings)([(0, place % len(images)) for place in range(size)]))
    with working("measuring the step"):
        steps = Steps(settings, k, batch, device)
        sides = (steps.ours(), steps.plain(), matrix_product(device, precision))
        ours, plain, product = in_turns(sides, seconds)
    our_flops, plain_flops = steps.flops()
    step = Comparison(ours, plain)
    per_flop = step.scaled(our_flops / 1e12, plain_flops / 1e12)
    limit = Comparison(per_flop.ours, product).scaled(1, 1e-12)
    return [
        Row("step", "timm's ViT of the same shape", "images/s", step),
        Row("step, FLOPs", "timm's ViT of the same shape", "TFLOP/s", per_flop),
        Row("step, limit", f"a large {precision} matrix product", "TFLOP/s", limit),
    ]


def _machine(rows: dict[str, Row], device: str, workers: int, precision: str, compiled: bool) -> Machine:
    return Machine(
        device=device,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        workers=workers,
        loader=rows["loader"].rates.rate,
        step=rows["step"].rates.rate,
        encode=rows["tower"].rates.rate,
        tower=rows["tower"].rates.bare_rate,
        assignment=rows["assignment"].rates.rate,
        share_of_limit=rows["step, limit"].rates.ratio,
        precision=precision,
        compiled=compiled,
        faiss_gpus=faiss_gpus(),
    )


def _share_of_peak(limit: Row, device: str, precision: str) -> float | None:
    """The step's FLOP/s over those of the GPU's data sheet, which are known for bfloat16 on some GPUs."""
    peak = peak_flops(device) if precision == "bfloat16" else None
    return None if peak is None else 1e12 * limit.rates.rate / peak


def show(measured: Throughput, *, as_json: bool = False) -> None:
    """Prints the table and the verdict, or all of it as JSON."""
    if as_json:
        results.print_json(measured.to_json())
        return
    from rich.table import Table

    about = measured.about
    title = f"{about['device']}, {about['cores']} cores, {about['workers']} workers, batch {about['batch_size']}"
    grid = Table(title=title, title_justify="left", caption=_caption(about), caption_justify="left")
    for heading in ("part", "ours", "bare", "ratio", "range"):
        grid.add_column(heading, justify="left" if heading == "part" else "right", no_wrap=True)
    grid.add_column("unit", no_wrap=True)
    grid.add_column("beside")
    for row in measured.rows:
        grid.add_row(*_cells(row))
    results.print(grid)
    for sentence in measured.sentences:
        results.print(sentence)


def _cells(row: Row) -> list[str]:
    rates, ratios = row.rates, row.rates.ratios
    span = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return [row.part, _number(rates.rate), _number(rates.bare_rate), f"{rates.ratio:.2f}", span, row.unit, row.against]


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _caption(about: dict[str, Any]) -> str:
    compiled = ", compiled" if about["compiled"] else ""
    share = about["share_of_peak"]
    peak = "" if share is None else f"; the step does {share:.1%} of the data sheet's peak"
    return f"{about['images']}; tower {about['tower']}; {about['model']}, {about['precision']}{compiled}{peak}"
