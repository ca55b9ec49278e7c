"""A run as it is when training begins or goes on: its parts, its folder, and what is written into it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ...shared.runtime.console import say
from ...shared.runtime.devices import peak_flops
from ...shared.runtime.distributed import World
from ...shared.storage.files import WriteLock, written_whole
from ...shared.tokens.store import TokenStore
from ..data.batch import check_grid
from ..data.batch_order import global_batches
from ..data.dataset import TokenisedImages
from ..data.join import join
from ..evaluation.run_probe import RunProbe
from ..settings import Settings
from ..training.plan import flops_per_image, make_plan
from ..training.step_metrics import StepMetrics
from ..training.trainer import Trainer
from ..weights.checkpoint import EMA, MODEL, OPTIMIZER, Checkpoints, load_tensors
from ..weights.init import start_from
from .jsonl import append_line, drop_lines_after
from .metrics import Logbook
from .record import write_record
from .resume import find_resumable, refuse_other_images, refuse_other_start


class Run:
    """What a run is made of, as it is when training begins or goes on."""

    def __init__(
        self, settings: Settings, store: TokenStore, data: TokenisedImages, out: Path, device: str, world: World
    ):
        self.settings, self.store, self.data, self.out, self.world = settings, store, data, out, world
        self.device = device
        self.plan = make_plan(settings, len(data), world.size)
        self.probe = RunProbe(settings, device) if world.is_first and settings.probe.images is not None else None
        self.trainer = Trainer(settings, store.k, self.plan, world, device)
        self.start = 0
        self.init: dict[str, str] | None = None
        self.checkpoints: Checkpoints
        self.logbook: Logbook

    def about(self, pending: list[dict[str, Any]]) -> dict[str, Any]:
        """What a checkpoint says besides tensors; `pending` are the metrics since the last line of metrics.jsonl."""
        settings = self.settings
        return {
            "model": settings.model.shape(self.store.k).to_json(),
            "input": {name: getattr(settings.data, name) for name in ("mean", "std", "interpolation")},
            "seed": settings.train.seed,
            "settings": settings.to_json(),
            "codebook_fingerprint": self.store.fingerprint,
            "view": self.store.view,
            "images": len(self.data),
            "keys_sha256": self.data.keys_sha256,
            "init": self.init,
            "loss_watch": self.trainer.watch.to_json(),
            "pending": pending,
        }

    def save(self, step: int) -> None:
        """Has a checkpoint written while training goes on."""
        pending, tensors = self.logbook.pending(step), self.trainer.tensors()
        if self.world.is_first:
            self.checkpoints.save(step, tensors, self.about(pending))

    def log_keys(self, step: int, keys: list[str]) -> None:
        """Adds the images that this process sees in a step to RUN/keys/."""
        append_line(self.out / "keys" / f"process-{self.world.rank}.jsonl", {"step": step, "keys": keys})

    def list_bad_step(self, step: int, problem: str) -> None:
        """Adds a step and its images, those of all processes, to RUN/bad-steps.jsonl."""
        if self.world.is_first:
            _, batch = next(global_batches(self.data, self.settings, step - 1))
            keys = [self.data.key(index) for index in batch.tolist()]
            append_line(self.out / "bad-steps.jsonl", {"step": step, "problem": problem, "keys": keys})

    def probe_now(self, step: int) -> None:
        """Probes the weights as they are and adds what was found to RUN/probe.jsonl."""
        weights = self.trainer.weights()
        if self.probe is not None:
            found = self.probe.measure(weights, self.store.k)
            append_line(self.out / "probe.jsonl", {"step": step, **found})
            self.logbook.probed(step, found)


def open_run(
    images: str | Path | Sequence[str | Path] | None,
    tokens: str | Path,
    out: Path,
    settings: Settings,
    init: str | Path | None,
    resume: str,
    device: str,
    world: World,
    lock: WriteLock,
) -> Run:
    """The run, new or as its newest checkpoint left it; its first process holds the `lock` of its folder."""
    store = TokenStore(tokens)
    check_grid(store, settings.model)
    world.on_rank_zero(lock.take)
    found = world.on_rank_zero(lambda: find_resumable(out, resume, settings, store))
    data = join_images(images, store, settings, world)
    run = world.all_or_raise(lambda: Run(settings, store, data, out, device, world))
    pending: list[StepMetrics] = []
    if found:
        path, state = found
        world.all_or_raise(lambda: refuse_other_images(path, state, data))
        world.all_or_raise(lambda: refuse_other_start(path, state["init"], init))
        run.trainer.prepare()
        names = [MODEL, OPTIMIZER, *([EMA] if settings.train.ema is not None else [])]
        run.trainer.restore({name: load_tensors(path, name) for name in names}, state["loss_watch"])
        run.start, run.init = state["step"], state["init"]
        pending = [StepMetrics(**metrics) for metrics in state["pending"]]
        say(f"Going on from {path} (step {run.start} of {run.plan.steps}).")
    else:
        if init is not None:
            run.init = world.all_or_raise(lambda: start_from(run.trainer.model, init))
        run.trainer.prepare()
    world.on_rank_zero(lambda: _begin_folder(run, lock))
    train = settings.train
    run.checkpoints = Checkpoints(out, train.keep_last, train.keep_every)
    run.logbook = Logbook(
        out,
        run.start,
        pending,
        every=train.log_every,
        steps=run.plan.steps,
        steps_per_epoch=run.plan.steps_per_epoch,
        peak_images_per_second=_peak_images_per_second(run),
        wandb=train.wandb,
        settings=settings.to_json(),
        writes=world.is_first,
    )
    world.wait()
    return run


def join_images(
    images: str | Path | Sequence[str | Path] | None, store: TokenStore, settings: Settings, world: World
) -> TokenisedImages:
    """The images of a run with their tokens, as its settings want them (`join.join`)."""
    data = settings.data
    return join(images, store, data.skip_missing, world, shuffle=data.shuffle, cache=data.cache)


def _peak_images_per_second(run: Run) -> float | None:
    """At the GPUs' greatest bfloat16 FLOP/s, where the maker states it."""
    peak = peak_flops(run.device)
    return peak and run.world.size * peak / flops_per_image(run.settings, run.store.k)


def _begin_folder(run: Run, lock: WriteLock) -> None:
    run.out.mkdir(parents=True, exist_ok=True)
    lock.take()
    with written_whole(run.out / "settings.yaml") as partial:
        OmegaConf.save(OmegaConf.structured(run.settings), partial)
    about = {
        "images": len(run.data),
        "keys_sha256": run.data.keys_sha256,
        "tokens": str(run.store.path),
        "view": run.store.view,
        "codebook_fingerprint": run.store.fingerprint,
        "init": run.init,
        "processes": run.world.size,
    }
    write_record(run.out, run.start, about)
    # What was written down after the checkpoint is about to happen again.
    for path in (*(run.out / "keys").glob("*.jsonl"), *run.out.glob("bad-steps.jsonl"), *run.out.glob("probe.jsonl")):
        drop_lines_after(path, run.start)
