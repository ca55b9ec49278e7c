"""build-codebook: patch features of a frozen tower -> a uniform sample -> FAISS k-means -> a codebook."""

import gc
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..shared.errors import DataError, UsageError
from ..shared.images.on_error import skips
from ..shared.runtime.console import say, table
from ..shared.runtime.devices import choose_device, choose_workers
from ..shared.runtime.distributed import World, joined_world
from ..shared.runtime.faiss_build import import_faiss
from ..shared.runtime.memory import memory_budget
from ..shared.sources.options import SourceOptions
from ..shared.sources.records import keys_sha256
from ..shared.sources.sources import SourceShard, open_source
from ..shared.storage.files import canonical_json, is_empty, written_whole
from ..shared.storage.lock import sole_writer
from ..shared.tokens.codebook import Codebook
from .kmeans.description import describe_codebook
from .kmeans.feature_cache import FeatureCache
from .kmeans.hierarchical import train_hierarchical
from .kmeans.patch_sample import choose_images
from .kmeans.plan import CodebookPlan, plan_codebook
from .kmeans.sampler import Sampler, SourceKeys, read_keys
from .kmeans.train import HIERARCHICAL, LLOYD, KMeansSettings, train_kmeans
from .towers.opening import open_tower
from .towers.tower import TowerSettings


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
    init: str = "random",
    algorithm: str = "lloyd",
    max_images: int | None = None,
    on_error: str = "stop",
    key_until: str | None = None,
    key_prefix: str | None = None,
    image_field: str | None = None,
    label_from: str | None = None,
    max_pixels: int | None = None,
    features_cache: str | Path | None = None,
    memory: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    compile: bool = False,
) -> Codebook:
    """Trains a k-means codebook over the patch features of a frozen tower (k-CLIP, arXiv 2306.07346, section 3).

    The same call resumes a stopped one, with any number of processes. Under torchrun the source's shards are
    distributed over the processes and the first process trains; the codebook has the same bytes with any number of
    them. If `out` already holds the codebook of the same request, it is returned at once.

    Args:
        images: Tars, folders of tars, or folders of class folders; patterns like train-{000..015}.tar, globs and URLs
            included.
        out: Folder to write the codebook to.
        tower: open_clip name, local-dir:PATH, hf-hub:ID, timm:NAME, or pixels (a patch's own pixels, the control
            without a teacher; pixels:P for patches of P pixels).
        pretrained: Tag or local file; 'none' for random weights (default: openai, or timm's own).
        layer: Index into forward_intermediates, negative from the end.
        final_norm: Take ViT features after the final norm.
        image_size: Pixels (default: the tower's own).
        precision: Precision of the tower, float32 or bfloat16.
        k: Number of centroids, at most 2^31.
        patches: Patch features to sample (default: 512 per centroid, or all if there are fewer).
        iterations: Iterations of k-means.
        restarts: Restarts of k-means; the best one is kept.
        metric: l2, or cosine (features of length one, spherical k-means).
        seed: Seed of the sample and of k-means.
        init: First centroids: random patches, or k-means++.
        algorithm: lloyd; or hierarchical, for a K x patches that is too large for it: k-means into cells, then within
            each.
        max_images: Use a seeded subset of this many images.
        on_error: At an unreadable image, stop, or skip it (it is counted and listed).
        key_until: Where an image's key ends in its file name, first-dot or last-dot (default: first-dot in tars, as in
            WebDataset, and last-dot in folders).
        key_prefix: none, or tar: keys begin with the name of their tar (of their folder, if several are given).
        image_field: Which picture of a key is its image, by what follows the key in its name, such as jpg or jpg,png.
        label_from: auto, or tar: the class of a tar's images is the name of the tar.
        max_pixels: Most pixels of an image (default: 178,956,970).
        features_cache: Folder that keeps the sampled features, so that another K needs no second extraction.
        memory: Memory for the sample and k-means, such as 8GB (default: 3/4 of what is free).
        batch_size: Images per forward pass.
        workers: Processes that decode images (default: 0 on the CPU, up to 16 on CUDA).
        device: auto, cpu or cuda.
        compile: Compile the tower with torch.compile, on GPUs and for long runs: the first batch takes a minute more.
            Features are equal to rounding.

    Returns:
        The codebook in `out`.

    Raises:
        UsageError: An option is invalid, or `out` holds a codebook made with other settings.
        DataError: Images, weights, memory, disk space or the sample are insufficient, or the features cache belongs to
            other features.
    """
    given = dict(locals())
    settings = TowerSettings(tower, pretrained, image_size, layer, final_norm, precision)
    kmeans = KMeansSettings(k, iterations, restarts, metric, seed, init, algorithm)
    kmeans.check_faiss()
    source = SourceOptions(key_until, key_prefix, image_field, max_pixels, label_from)
    options = _Options(settings, kmeans, patches, skips(on_error), memory, batch_size, workers, device, compile)
    memory_budget(memory)
    path, clock = Path(out), _Clock()
    with (
        joined_world(given=given) as world,
        sole_writer(path, world),
        sole_writer(Path(features_cache), world, option="--features-cache") if features_cache else nullcontext(),
    ):
        shards = open_source(images, source, skip=options.skip)
        keys = read_keys(shards, world, options.skip)
        image_keys = choose_images(keys.all_keys(), max_images, seed)
        request = {**asdict(settings), **kmeans.to_json(), "patches": patches, "keys_sha256": keys_sha256(image_keys)}
        if world.on_rank_zero(lambda: _already_built(path, request)):
            return Codebook.load(path)
        plan, cache = _extract(path, shards, keys, image_keys, request, features_cache, options, world)
        clock.lap("extract")
        world.on_rank_zero(lambda: _train(path, plan, cache, keys, options, world, clock))
        return Codebook.load(path)


@dataclass(frozen=True)
class _Options:
    """The validated options of the command."""

    tower: TowerSettings
    kmeans: KMeansSettings
    patches: int | None
    skip: bool
    memory: str | None
    batch_size: int
    workers: int | None
    device: str
    compile: bool


@dataclass
class _Clock:
    """Seconds from lap to lap."""

    laps: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"{name}_seconds"] = round(now - self._last, 3)
        self._last = now


def _work_folder(out: Path) -> Path:
    """The hidden folder that is kept until the codebook is whole, so that the same command can resume."""
    return out.with_name(f".{out.name}.work")


def _already_built(out: Path, request: dict[str, Any]) -> bool:
    if not out.is_file() and is_empty(out):
        return False
    if not (out / "codebook.json").exists():
        raise UsageError(f"{out} already exists and is not a codebook; choose another --out or delete it.")
    absent = {"init": "random", "algorithm": LLOYD}  # what it means that a request lacks a field
    before = absent | Codebook.load(out).description["request"]
    changed = [name for name, value in (absent | request).items() if before.get(name) != value]
    if changed:
        raise UsageError(
            f"{out} already holds a codebook made with other settings ({', '.join(changed)}); "
            "choose another --out or delete it."
        )
    say(f"{out} already holds this codebook; nothing to do.")
    shutil.rmtree(_work_folder(out), ignore_errors=True)
    return True


def _extract(
    out: Path,
    shards: Sequence[SourceShard],
    keys: SourceKeys,
    image_keys: Sequence[str],
    request: dict[str, Any],
    features_cache: str | Path | None,
    options: _Options,
    world: World,
) -> tuple[CodebookPlan, FeatureCache]:
    """Plans the sample and extracts its features into the cache. The tower's memory is free again afterwards."""
    tower, kmeans = open_tower(options.tower, choose_device(options.device)), options.kmeans
    if options.compile:
        tower.compile()
    height, width = tower.grid
    name = options.tower.tower
    say(f"{name}: {height}x{width} patches, {tower.dim} features, on {tower.device}; {len(image_keys)} images.")
    folder = Path(features_cache) if features_cache else _work_folder(out) / "features"
    cache = FeatureCache(folder, tower.dim, owned=not features_cache)
    plan = world.on_rank_zero(
        lambda: plan_codebook(tower, keys, image_keys, options.patches, kmeans, request, options.memory, cache)
    )
    subset = None if len(image_keys) == len(keys.all_keys()) else frozenset(image_keys)
    workers = choose_workers(options.workers, tower.device.type)
    unit_length = kmeans.metric == "cosine"
    sampler = Sampler(tower, plan.extracted, subset, unit_length, options.skip, options.batch_size, workers)
    sampler.fill(cache, shards, keys, world)
    return plan, cache


def _train(
    out: Path,
    plan: CodebookPlan,
    cache: FeatureCache,
    keys: SourceKeys,
    options: _Options,
    world: World,
    clock: _Clock,
) -> None:
    """Trains k-means on the extracted features and writes the codebook, in the first process."""
    kmeans = options.kmeans
    unreadable = cache.skipped()
    if unreadable and not options.skip:
        key, reason = unreadable[0]
        raise DataError(f"{cache.path} was filled with --on-error skip and lacks image {key!r} ({reason}).")
    rows = cache.features(plan.sample.most)
    train = cache.features(plan.sample.most_train)
    if len(train) < kmeans.k:
        raise DataError(f"--k {kmeans.k} is more than the {len(train)} patches that could be read; use a smaller --k.")
    gc.collect()  # frees the tower's memory
    _use_all_cores(world)
    work = _work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    rows_identity = canonical_json({**plan.identity, "most": plan.sample.most_train})
    state = work / "kmeans.safetensors"
    trained = train_hierarchical if kmeans.algorithm == HIERARCHICAL else train_kmeans
    run = trained(train, kmeans, memory=memory_budget(options.memory), state=state, rows_identity=rows_identity)
    clock.lap("k-means")
    skipped = [*keys.skipped, *unreadable]
    codebook = describe_codebook(plan, kmeans, run, train, rows[len(train) :], skipped, len(unreadable))
    clock.lap("statistics")
    with written_whole(out) as partial:
        codebook.save(partial)
        (partial / "timings.json").write_text(json.dumps(clock.laps, indent=1) + "\n")
    shutil.rmtree(work)
    _summary(codebook, out)


def _use_all_cores(world: World) -> None:
    """Lets FAISS use all cores: torchrun gives each process one thread, and the other processes are waiting now."""
    if world.size > 1 and hasattr(os, "sched_getaffinity"):
        import_faiss().omp_set_num_threads(len(os.sched_getaffinity(0)))


def _summary(codebook: Codebook, out: Path) -> None:
    made_by = codebook.description
    preprocess, training, held_out, best = (made_by[n] for n in ("preprocess", "training", "held_out", "best_restart"))
    how = f"K={made_by['k']}, {made_by['metric']}, {made_by['restarts']} restarts, on {made_by['faiss_device'].upper()}"
    how += f", hierarchical ({made_by['cells']} cells)" if "cells" in made_by else ""
    split = sum(sum(run) for run in made_by["empty_clusters_split"])
    sample = made_by["sample"]
    tower = f"layer {made_by['layer']}, {preprocess['image_size']} px, {made_by['precision']}"
    rows = [
        ("tower", f"{made_by['tower']} ({tower})"),
        ("images", f"{sample['images']:,}"),
        ("patches sampled", f"{sample['patches']:,} (+ {sample['held_out']:,} held out)"),
        ("k-means", how),
        ("objective per iteration", " ".join(f"{value:.4g}" for value in made_by["objective"][best])),
        ("empty clusters split", f"{split} in all restarts, {made_by['empty_clusters_split'][best][-1]} at the end"),
        ("codes used / dead", f"{training['used']} / {training['dead']}"),
        ("imbalance", f"{training['imbalance']:.3g} (1 is even)"),
        ("perplexity, training", f"{training['perplexity']:.1f} of {made_by['k']}"),
        ("perplexity, held out", f"{held_out['perplexity']:.1f} of {made_by['k']} ({held_out['used']} codes used)"),
        ("fingerprint", codebook.fingerprint),
        ("written to", str(out)),
    ]
    if sample["skipped"]:
        key, reason = sample["skipped"][0]
        rows.append(("skipped", f"{len(sample['skipped'])}, the first is {key or '(no key)'}: {reason}"))
    table("Codebook", rows)
