"""build-codebook: patch features of a frozen tower -> a uniform sample -> FAISS k-means -> a codebook artifact."""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..shared.codebook import MAX_K, Codebook, faiss_gpus, import_faiss, usage
from ..shared.console import progress, say, table, working
from ..shared.devices import choose_device, choose_workers, refuse_many_processes
from ..shared.errors import DataError, UsageError
from ..shared.files import written_whole
from ..shared.images import ImageRecord, keys_sha256
from ..shared.sources import read_records
from ..shared.views import CENTER
from .extract import extract
from .sample import PatchSample, choose_images, draw_sample
from .towers import Tower, TowerSettings, open_tower

METRICS = ("l2", "cosine")
PATCHES_PER_CENTROID = 512
_MOST_HELD_OUT = 65_536
_HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class KMeansSettings:
    """How centroids are trained. Defaults are the paper's."""

    k: int = 8192
    iterations: int = 20
    restarts: int = 5
    metric: str = "l2"
    seed: int = 0

    def __post_init__(self):
        if not 2 <= self.k <= MAX_K:
            raise UsageError(f"--k {self.k} must lie between 2 and {MAX_K} (tokens are stored as uint16).")
        if self.iterations < 1 or self.restarts < 1:
            raise UsageError("--iterations and --restarts must be at least 1.")
        if self.metric not in METRICS:
            raise UsageError(f"--metric {self.metric} is unknown; choose {' or '.join(METRICS)}.")


def build_codebook(
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    tower: str = "RN50x64",
    pretrained: str | None = None,
    layer: int = -1,
    final_norm: bool = False,
    image_size: int | None = None,
    precision: str = "float32",
    k: int = 8192,
    patches: int | None = None,
    iterations: int = 20,
    restarts: int = 5,
    metric: str = "l2",
    seed: int = 0,
    max_images: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
) -> Codebook:
    """Trains a k-CLIP codebook (arXiv 2306.07346, section 3) and writes it to the folder `out`.

    Args:
        images: a tar, a folder, a brace pattern of tars, or a list of tars (see `shared.images.open_source`).
        out: folder to write; if it already holds the codebook of this very request, that one is returned.
        tower: open_clip name, `local-dir:PATH`, `hf-hub:ID` or `timm:NAME`.
        pretrained: tag or file; None is "openai" for an open_clip name, timm's default tag, or the folder's own;
            "none" means seeded random weights.
        layer: index into the tower's `forward_intermediates`, negative from the end.
        final_norm: whether a ViT's features are taken after its final norm.
        image_size: pixels, if not the tower's own.
        precision: of the tower, "float32" or "bfloat16".
        k: number of centroids, at most 65,536.
        patches: how many patch features to sample; None is 512 a centroid, or all there are if fewer.
        iterations, restarts, metric, seed: of k-means; metric "cosine" means unit features and spherical k-means.
        max_images: use only a seeded subset of this many images.
        batch_size, workers, device: how to run; no influence on which patches are sampled.

    Raises:
        UsageError for settings that cannot be, DataError for images, weights or a sample that do not suffice.
    """
    refuse_many_processes()
    settings = TowerSettings(tower, pretrained, image_size, layer, final_norm, precision)
    kmeans = KMeansSettings(k, iterations, restarts, metric, seed)
    import_faiss()
    records = read_records(images)
    chosen = choose_images(records, max_images, seed)
    out = Path(out)
    request = {**asdict(settings), **asdict(kmeans), "patches": patches, "keys_sha256": keys_sha256(chosen)}
    if out.exists():
        return _already_built(out, request)

    device = choose_device(device)
    opened = open_tower(settings, device)
    say(
        f"{tower}: {opened.grid[0]}x{opened.grid[1]} patches, {opened.dim} features, on {device}; {len(chosen)} images."
    )
    sample = _plan_sample(opened, chosen, patches, kmeans)
    clock = _Clock()
    features = _sample_features(opened, chosen, sample, batch_size, choose_workers(workers, device), metric)
    clock.lap("extract")
    train, held_out = features[: sample.train], features[sample.train :]
    centroids, objective = _train_kmeans(train, kmeans)
    clock.lap("k-means")
    codebook = _describe(opened, kmeans, request, chosen, sample, centroids, objective, train, held_out)
    clock.lap("statistics")
    with written_whole(out) as partial:
        codebook.save(partial)
        (partial / "timings.json").write_text(json.dumps(clock.laps, indent=1) + "\n")
    _summary(codebook, out)
    return codebook


class _Clock:
    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"{name}_seconds"] = round(now - self._last, 3)
        self._last = now


def _already_built(out: Path, request: dict[str, Any]) -> Codebook:
    codebook = Codebook.load(out)
    before = codebook.description["request"]
    changed = [name for name, value in request.items() if before.get(name) != value]
    if changed:
        raise UsageError(
            f"{out} already holds a codebook made with other settings ({', '.join(changed)}); "
            "choose another --out or delete it."
        )
    say(f"{out} already holds this codebook; nothing to do.")
    return codebook


def _plan_sample(
    tower: Tower, records: Sequence[ImageRecord], patches: int | None, kmeans: KMeansSettings
) -> PatchSample:
    per_image = tower.grid[0] * tower.grid[1]
    total = len(records) * per_image
    held_out = min(_MOST_HELD_OUT, int(total * _HELD_OUT_SHARE))
    train = min(patches or PATCHES_PER_CENTROID * kmeans.k, total - held_out)
    if kmeans.k > train:
        raise DataError(
            f"--k {kmeans.k} is larger than the sample: {len(records)} images x {per_image} patches, less {held_out} "
            f"held out, capped by --patches, leave {train} patches; use a smaller --k or more images or patches."
        )
    needed = (train + held_out) * tower.dim * 4
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise DataError(
            f"The sample does not fit in memory: ({train} + {held_out} held out) patches x {tower.dim} x 4 bytes "
            f"= {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free; use a smaller --patches."
        )
    return draw_sample([record.key for record in records], per_image, train, held_out, kmeans.seed)


def _sample_features(
    tower: Tower, records: Sequence[ImageRecord], sample: PatchSample, batch_size: int, workers: int, metric: str
) -> np.ndarray:
    """The sampled features (train + held out, dim) float32, in the sample's order. Unsampled images are not decoded."""
    features = np.empty((len(sample), tower.dim), dtype=np.float32)
    needed = np.unique(sample.image)
    starts = np.searchsorted(sample.image, needed, side="left")
    ends = np.searchsorted(sample.image, needed, side="right")
    done = 0
    with progress("extracting features", len(needed)) as advance:
        for batch in extract(tower, [records[index] for index in needed], CENTER, batch_size, workers, metric):
            for image in batch.features[:, 0]:
                picked = slice(starts[done], ends[done])
                features[sample.row[picked]] = image[sample.patch[picked]]
                done += 1
            advance(len(batch.features))
    return features


def _train_kmeans(features: np.ndarray, settings: KMeansSettings) -> tuple[np.ndarray, list[list[float]]]:
    """FAISS k-means: centroids (K, dim) float32 and the objective of each iteration of each restart up to the best one.

    FAISS keeps the statistics until the restart that won, which is the last of the list.
    """
    faiss = import_faiss()
    gpu = faiss_gpus() > 0
    where = f"{faiss_gpus()} GPU(s)" if gpu else "the CPU (no GPU, or the CPU build of FAISS)"
    kmeans = faiss.Kmeans(
        features.shape[1],
        settings.k,
        niter=settings.iterations,
        nredo=settings.restarts,
        seed=settings.seed,
        spherical=settings.metric == "cosine",
        gpu=gpu,
        # FAISS would otherwise subsample without a word at 256 points a centroid.
        max_points_per_centroid=math.ceil(len(features) / settings.k) + 1,
        min_points_per_centroid=1,
    )
    with working(f"k-means on {where}: K={settings.k}, {len(features)} patches, {settings.restarts} restarts"):
        kmeans.train(features)
    objective = [float(step["obj"]) for step in kmeans.iteration_stats]
    runs = [objective[at : at + settings.iterations] for at in range(0, len(objective), settings.iterations)]
    return np.ascontiguousarray(kmeans.centroids, dtype=np.float32), runs


def _describe(
    tower: Tower,
    kmeans: KMeansSettings,
    request: dict[str, Any],
    records: Sequence[ImageRecord],
    sample: PatchSample,
    centroids: np.ndarray,
    objective: list[list[float]],
    train: np.ndarray,
    held_out: np.ndarray,
) -> Codebook:
    draft = Codebook(centroids, np.zeros(kmeans.k, dtype=np.int64), {})
    tokens, train_distances = draft.assign(train)
    counts = np.bincount(tokens, minlength=kmeans.k)
    held_out_tokens, distances = draft.assign(held_out)
    description = {
        **tower.description(),
        **asdict(kmeans),
        "faiss_device": "gpu" if faiss_gpus() else "cpu",
        "objective": objective,
        "sample": {
            "images": len(records),
            "patches": sample.train,
            "held_out": len(held_out),
            "keys_sha256": request["keys_sha256"],
            "drawn": "uniform over all patches, without replacement: the smallest draws by (seed, key)",
        },
        "training": {**usage(counts), "mean_squared_distance": float(train_distances.mean())},
        "held_out": {
            **usage(np.bincount(held_out_tokens, minlength=kmeans.k)),
            "mean_squared_distance": float(distances.mean()) if len(distances) else None,
        },
        "request": request,
        "versions": {name: version(name) for name in ("torch", "open_clip_torch", "timm", "numpy", "pillow")}
        | {"faiss": import_faiss().__version__},
    }
    return Codebook(centroids, counts.astype(np.int64), description)


def _summary(codebook: Codebook, out: Path) -> None:
    about = codebook.description
    best = (
        min(about["objective"], key=lambda run: run[-1])
        if about["metric"] == "l2"
        else max(about["objective"], key=lambda run: run[-1])
    )
    opened, training, held_out = about["preprocess"], about["training"], about["held_out"]
    table(
        "Codebook",
        [
            (
                "tower",
                f"{about['tower']} (layer {about['layer']}, {opened['image_size']} px, {about['precision']})",
            ),
            ("images seen", f"{about['sample']['images']:,}"),
            ("patches sampled", f"{about['sample']['patches']:,} (+ {about['sample']['held_out']:,} held out)"),
            (
                "k-means",
                f"K={about['k']}, {about['metric']}, {about['restarts']} restarts, on {about['faiss_device'].upper()}",
            ),
            ("objective per iteration", " ".join(f"{value:.4g}" for value in best)),
            ("codes used / dead", f"{training['used']} / {training['dead']}"),
            ("perplexity, training", f"{training['perplexity']:.1f} of {about['k']}"),
            ("perplexity, held out", f"{held_out['perplexity']:.1f} of {about['k']} ({held_out['used']} codes used)"),
            ("fingerprint", codebook.fingerprint),
            ("written to", str(out)),
        ],
    )
