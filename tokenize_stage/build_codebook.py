"""build-codebook: patch features of a frozen tower -> a uniform sample -> FAISS k-means -> a codebook artifact."""

import gc
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..shared.errors import DataError, UsageError
from ..shared.images.records import keys_sha256
from ..shared.images.sources import open_source
from ..shared.runtime.console import say, table
from ..shared.runtime.devices import choose_device, choose_workers
from ..shared.runtime.distributed import World, joined_world
from ..shared.runtime.faiss_build import import_faiss
from ..shared.runtime.memory import memory_budget
from ..shared.storage.files import canonical_json, written_whole
from ..shared.tokens.codebook import Codebook
from .kmeans.description import describe_codebook
from .kmeans.feature_cache import FeatureCache
from .kmeans.patch_sample import choose_images
from .kmeans.plan import CodebookPlan, plan_codebook
from .kmeans.sampler import Sampler, Survey, survey
from .kmeans.train import KMeansSettings, train_kmeans
from .towers.on_error import skips
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
    max_images: int | None = None,
    on_error: str = "stop",
    features_cache: str | Path | None = None,
    memory: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
) -> Codebook:
    """Trains a k-CLIP codebook (arXiv 2306.07346, section 3) and writes it to the folder `out`.

    Under torchrun the source's shards are spread over the processes, and the first one trains; the codebook is the
    same to the last byte. The same call goes on where a stopped one was, with any number of processes.

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
        init: first centroids: "random" patches, or "k-means++".
        max_images: use only a seeded subset of this many images.
        on_error: "stop" at what cannot be read, or "skip" it; the codebook lists what was skipped, and why.
        features_cache: folder that keeps the sampled features, so that another K needs no second extraction.
        memory: what the sample and k-means may take, such as "8GB"; None is three quarters of what is free. Features
            that do not fit stay on disk.
        batch_size, workers, device: how to run; no influence on which patches are sampled.

    Raises:
        UsageError for settings that cannot be, DataError for images, weights, memory or a sample that do not suffice,
        or a features cache of something else.
    """
    settings = TowerSettings(tower, pretrained, image_size, layer, final_norm, precision)
    kmeans = KMeansSettings(k, iterations, restarts, metric, seed, init)
    kmeans.check_faiss()
    skip = skips(on_error)
    memory_budget(memory)
    out, clock = Path(out), _Clock()
    with joined_world() as world:
        shards = open_source(images)
        found = survey(shards, world, skip)
        chosen = choose_images(found.all_keys(), max_images, seed)
        request = {**asdict(settings), **asdict(kmeans), "patches": patches, "keys_sha256": keys_sha256(chosen)}
        if world.on_rank_zero(lambda: _already_built(out, request)):
            return Codebook.load(out)
        opened = open_tower(settings, choose_device(device))
        height, width = opened.grid
        say(f"{tower}: {height}x{width} patches, {opened.dim} features, on {opened.device}; {len(chosen)} images.")
        folder = Path(features_cache) if features_cache else _work_folder(out) / "features"
        cache = FeatureCache(folder, opened.dim, owned=not features_cache)
        plan = world.on_rank_zero(lambda: plan_codebook(opened, found, chosen, patches, kmeans, request, memory, cache))
        some = None if len(chosen) == len(found.all_keys()) else frozenset(chosen)
        processes = choose_workers(workers, opened.device.type)
        sampler = Sampler(opened, plan.extracted, some, metric, skip, batch_size, processes)
        sampler.fill(cache, shards, found, world)
        clock.lap("extract")
        opened = sampler = None  # the tower's memory is for k-means now
        world.on_rank_zero(lambda: _train(out, plan, kmeans, cache, found, skip, memory, world, clock))
        return Codebook.load(out)


class _Clock:
    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[f"{name}_seconds"] = round(now - self._last, 3)
        self._last = now


def _work_folder(out: Path) -> Path:
    """What is kept until the codebook is whole, so that the same command can go on."""
    return out.with_name(f".{out.name}.work")


def _already_built(out: Path, request: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    before = {"init": "random"} | Codebook.load(out).description["request"]
    changed = [name for name, value in request.items() if before.get(name) != value]
    if changed:
        raise UsageError(
            f"{out} already holds a codebook made with other settings ({', '.join(changed)}); "
            "choose another --out or delete it."
        )
    say(f"{out} already holds this codebook; nothing to do.")
    shutil.rmtree(_work_folder(out), ignore_errors=True)
    return True


def _train(
    out: Path,
    plan: CodebookPlan,
    kmeans: KMeansSettings,
    cache: FeatureCache,
    found: Survey,
    skip: bool,
    memory: str | None,
    world: World,
    clock: _Clock,
) -> None:
    """From the features to the codebook's folder, in the first process."""
    unreadable = cache.skipped()
    if unreadable and not skip:
        key, reason = unreadable[0]
        raise DataError(f"{cache.path} was filled with --on-error skip and lacks image {key!r} ({reason}).")
    rows = cache.features(plan.sample.most)
    train = cache.features(plan.sample.most_train)
    if len(train) < kmeans.k:
        raise DataError(f"--k {kmeans.k} is more than the {len(train)} patches that could be read; use a smaller --k.")
    gc.collect()  # the tower goes, and with it what memory it had
    _use_all_cores(world)
    work = _work_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    of_what = canonical_json({**plan.identity, "most": plan.sample.most_train})
    state = work / "kmeans.safetensors"
    run = train_kmeans(train, kmeans, memory=memory_budget(memory), state=state, about=of_what)
    clock.lap("k-means")
    skipped = [*found.skipped, *unreadable]
    codebook = describe_codebook(plan, kmeans, run, train, rows[len(train) :], skipped, len(unreadable))
    clock.lap("statistics")
    with written_whole(out) as partial:
        codebook.save(partial)
        (partial / "timings.json").write_text(json.dumps(clock.laps, indent=1) + "\n")
    shutil.rmtree(work)
    _summary(codebook, out)


def _use_all_cores(world: World) -> None:
    """torchrun gives each of its processes one thread; now that the others wait, the first one may have all."""
    if world.size > 1 and hasattr(os, "sched_getaffinity"):
        import_faiss().omp_set_num_threads(len(os.sched_getaffinity(0)))


def _summary(codebook: Codebook, out: Path) -> None:
    about = codebook.description
    opened, training, held_out, best = (about[n] for n in ("preprocess", "training", "held_out", "best_restart"))
    how = f"K={about['k']}, {about['metric']}, {about['restarts']} restarts, on {about['faiss_device'].upper()}"
    split = sum(sum(run) for run in about["empty_clusters_split"])
    sample = about["sample"]
    rows = [
        ("tower", f"{about['tower']} (layer {about['layer']}, {opened['image_size']} px, {about['precision']})"),
        ("images seen", f"{sample['images']:,}"),
        ("patches sampled", f"{sample['patches']:,} (+ {sample['held_out']:,} held out)"),
        ("k-means", how),
        ("objective per iteration", " ".join(f"{value:.4g}" for value in about["objective"][best])),
        ("empty clusters split", f"{split} in all restarts, {about['empty_clusters_split'][best][-1]} at the end"),
        ("codes used / dead", f"{training['used']} / {training['dead']}"),
        ("imbalance", f"{training['imbalance']:.3g} (1 is even)"),
        ("perplexity, training", f"{training['perplexity']:.1f} of {about['k']}"),
        ("perplexity, held out", f"{held_out['perplexity']:.1f} of {about['k']} ({held_out['used']} codes used)"),
        ("fingerprint", codebook.fingerprint),
        ("written to", str(out)),
    ]
    if sample["skipped"]:
        key, reason = sample["skipped"][0]
        rows.append(("skipped", f"{len(sample['skipped'])}, the first is {key or '(no key)'}: {reason}"))
    table("Codebook", rows)
