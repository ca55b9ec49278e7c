"""pretrain: images and their stored tokens -> a pre-trained MaPeT. One process; no teacher, no masks in the loader."""

import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import OmegaConf
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from ..shared.console import progress, say, table
from ..shared.devices import choose_device, choose_workers, refuse_many_processes, refuse_missing_compiler
from ..shared.errors import Interrupted, UsageError
from ..shared.files import written_whole
from ..shared.loading import batches
from ..shared.token_store import TokenStore
from .checkpoint import load_checkpoint, newest_checkpoint, prune, read_state, save_checkpoint
from .data import LoadSample, TokenisedImages, batch_places, check_grid, join
from .interchange import start_from
from .logbook import Logbook, StepMetrics
from .loss import token_loss
from .model import Layout, MaPeT, drop_path_keep
from .objectives import step_layout
from .resume import find_resumable, refuse_other_images, refuse_other_start
from .settings import OptimizerSettings, Settings, resolve


def pretrain(
    images: str | Path | Sequence[str | Path] | None,
    tokens: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    objective: str | None = None,
    init: str | Path | None = None,
    resume: str = "auto",
    device: str = "auto",
) -> Path:
    """Pre-trains MaPeT (arXiv 2306.07346) and returns the folder of the last checkpoint.

    Args:
        images: a tar, a folder, a brace pattern of tars, or a list of tars; None if the token store holds the images.
        tokens: the token store of these images.
        out: the run's folder: settings.yaml, run.json, metrics.jsonl, TensorBoard events, checkpoints/.
        recipe: a shipped recipe's name or a YAML file; overrides: "key=value" settings (see `settings.Settings`).
        objective: "mapet", "pim" or "mim"; the same as the setting objective.name.
        init: weights to start from (a run, a checkpoint, an import, an export or a published `.pth.tar`); positions
            are resampled to the model's grid, and what the weights lack or have for another K starts fresh.
        resume: "auto" goes on from the newest checkpoint in `out`, if there is one; "never" refuses if there is.
        device: "auto", "cpu" or "cuda".

    Raises:
        UsageError for settings that cannot be or that differ from those of the run to go on with, DataError for
        images or tokens that are missing or damaged, FingerprintMismatch for tokens of another codebook than before.
    """
    refuse_many_processes()
    chosen = [] if objective is None else [f"objective.name={objective}"]
    settings = resolve(recipe, [*overrides, *chosen])
    store, out = TokenStore(tokens), Path(out)
    check_grid(store, settings.model)
    last = find_resumable(out, resume, settings, store)
    device = choose_device(device)
    data = join(images, store, settings.data.skip_missing)
    run = _Run(settings, data, store, out, device)
    start, pending = 0, []
    if last:
        state = read_state(last)
        refuse_other_images(last, state, data)
        refuse_other_start(last, state["init"], init)
        start, pending, run.init = load_checkpoint(last, run.model, run.optimizer), state["pending"], state["init"]
        say(f"Going on from {last} (step {start} of {run.steps}).")
    elif init is not None:
        run.init = start_from(run.model, init)
    _write_record(run)
    logbook = Logbook(
        out,
        start,
        [StepMetrics(**metrics) for metrics in pending],
        every=settings.train.log_every,
        steps=run.steps,
        steps_per_epoch=run.steps_per_epoch,
    )
    with logbook:
        path = _train(run, start, logbook)
    _summary(run, path, logbook)
    return path


class _Run:
    """What a run is made of: settings, data, model, optimizer, schedule; and how its state is saved."""

    def __init__(self, settings: Settings, data: TokenisedImages, store: TokenStore, out: Path, device: str):
        self.settings, self.data, self.store, self.out, self.device = settings, data, store, out, device
        self.init: dict[str, str] | None = None
        train, optimizer = settings.train, settings.optimizer
        self.steps_per_epoch = len(data) // train.batch_size
        if not self.steps_per_epoch:
            raise UsageError(f"train.batch_size {train.batch_size} is larger than the {len(data)} images.")
        self.steps = train.epochs * self.steps_per_epoch
        warmup = round(optimizer.warmup_epochs * self.steps_per_epoch)
        if warmup >= self.steps:
            raise UsageError(
                f"optimizer.warmup_epochs {optimizer.warmup_epochs} is not shorter than {train.epochs} epochs."
            )
        torch.manual_seed(train.seed)
        self.model = MaPeT(settings.model.shape(store.k)).to(device).train()
        self.model.grad_checkpointing = settings.execution.grad_checkpointing
        if settings.execution.compile:
            refuse_missing_compiler()
            for block in self.model.blocks:
                block.compile()
        self.optimizer = _adamw(self.model, optimizer)
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=self.steps - warmup,
            lr_min=optimizer.min_lr,
            warmup_t=warmup,
            warmup_lr_init=optimizer.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        chosen = train.precision if train.precision != "auto" else "bfloat16" if device == "cuda" else "float32"
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=chosen == "bfloat16")
        self.mean = torch.tensor(settings.data.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(settings.data.std, device=device).view(1, 3, 1, 1)

    def layout(self, step: int) -> Layout:
        settings = self.settings
        return step_layout(
            settings.objective, self.model.shape.patches, settings.train.seed, step, self.steps, self.device
        )

    def save(self, step: int, pending: list[dict[str, float]]) -> Path:
        """Writes a checkpoint; `pending` are the metrics since the last line of metrics.jsonl."""
        settings = self.settings
        about = {
            "model": settings.model.shape(self.store.k).to_json(),
            "input": {name: getattr(settings.data, name) for name in ("mean", "std", "interpolation")},
            "seed": settings.train.seed,
            "settings": settings.to_json(),
            "codebook_fingerprint": self.store.fingerprint,
            "view": self.store.view,
            "images": len(self.data),
            "keys_sha256": self.data.keys_sha256,
            "init": self.init,
            "pending": pending,
        }
        path = save_checkpoint(self.out, step, self.model, self.optimizer, about)
        prune(self.out, settings.train.keep_last)
        return path


def _adamw(model: MaPeT, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Weight decay on matrices only: not on biases, norms, LayerScale, positions and class token."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps)


def _write_record(run: _Run) -> None:
    run.out.mkdir(parents=True, exist_ok=True)
    with written_whole(run.out / "settings.yaml") as partial:
        OmegaConf.save(OmegaConf.structured(run.settings), partial)
    record = {
        "command": sys.argv,
        "images": len(run.data),
        "tokens": str(run.store.path),
        "codebook_fingerprint": run.store.fingerprint,
        "init": run.init,
        "versions": {name: version(name) for name in ("torch", "timm", "numpy", "pillow")},
    }
    with written_whole(run.out / "run.json") as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


@contextmanager
def _stop_between_steps() -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C or SIGTERM sets, so that a step is never cut in two."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(run: _Run, start: int, logbook: Logbook) -> Path:
    train = run.settings.train
    places = batch_places(len(run.data), train.batch_size, train.epochs, train.seed, train.accumulate, start)
    loader = batches(
        LoadSample(run.data, run.settings),
        places,
        choose_workers(run.settings.data.workers, run.device),
        pin_memory=run.device == "cuda",
    )
    path = newest_checkpoint(run.out)
    with _stop_between_steps() as stop, progress("pre-training", run.steps, "steps", start) as advance:
        for step in range(start, run.steps):
            metrics = _step(run, step, [next(loader) for _ in range(train.accumulate)])
            advance(1, logbook.note(step + 1, metrics))
            done = step + 1 == run.steps
            if done or stop.is_set() or (step + 1) % train.checkpoint_every == 0:
                path = run.save(step + 1, logbook.pending())
            if stop.is_set() and not done:
                raise Interrupted(
                    f"Stopped after step {step + 1} of {run.steps}; {path} is written. Give the same command to go on."
                )
    return path


def _step(run: _Run, step: int, parts: list[dict[str, Tensor]]) -> StepMetrics:
    """One optimizer step on one global batch, in `parts` of equal size."""
    run.schedule.step_update(step)
    layout = run.layout(step)
    loss_sum = correct = torch.zeros((), device=run.device)
    for part in parts:
        loss, hits = _part(run, layout, part)
        (loss / len(parts)).backward()
        loss_sum, correct = loss_sum + loss.detach() / len(parts), correct + hits
    limit = run.settings.optimizer.clip_grad
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit or float("inf"))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    images = sum(len(part["tokens"]) for part in parts)
    lr = run.optimizer.param_groups[0]["lr"]
    return StepMetrics(loss_sum, correct, norm, images * len(layout.ranks), images, lr)


def _part(run: _Run, layout: Layout, part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy over the predicted tokens, how many of them were guessed right) of one micro-batch."""
    moved = {name: tensor.to(run.device, non_blocking=True) for name, tensor in part.items()}
    pixels = moved["pixels"].float().div_(255).sub_(run.mean).div_(run.std)
    targets = moved["tokens"][:, layout.visible :][:, layout.ranks]
    with run.autocast:
        keep = drop_path_keep(moved["draws"], run.settings.model.drop_path)
        rows = run.model.predict_rows(pixels, moved["order"], layout, keep)
        return token_loss(rows, run.model.decoder, targets, run.settings.execution.loss_chunk)


def _summary(run: _Run, path: Path, logbook: Logbook) -> None:
    first, last = logbook.lines[0], logbook.lines[-1]
    table(
        "Pre-training",
        [
            ("images", f"{len(run.data):,}, {run.settings.train.epochs} epochs, {run.steps:,} steps"),
            ("parameters", f"{sum(p.numel() for p in run.model.parameters()):,}"),
            ("loss", f"{first['loss']:.3f} (steps to {first['step']}) -> {last['loss']:.3f} (steps to {last['step']})"),
            ("masked-token accuracy", f"{first['accuracy']:.2%} -> {last['accuracy']:.2%}"),
            ("images/s", f"{logbook.images_per_second:.1f}" if logbook.images else "nothing left to do"),
            ("checkpoint", str(path)),
        ],
    )
