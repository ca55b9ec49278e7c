"""pretrain: images and their stored tokens -> a pre-trained MaPeT. No teacher (but for the control), no masks in the
loader."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..shared.artifacts.fields import checked
from ..shared.errors import UsageError
from ..shared.runtime.console import table
from ..shared.runtime.devices import choose_device
from ..shared.runtime.distributed import World, joined_world
from ..shared.storage.lock import sole_writer
from ..shared.tokens.store import TokenStore
from .data.batch import check_grid
from .runs.jsonl import read_lines
from .runs.loop import dry_run, train
from .runs.opening import open_run
from .runs.resume import ResumePoint, extended, find_resume_point
from .settings import TOKENS, Settings, flat, resolve
from .tasks.feature_regression import FeatureRegression, SavedTeacher, open_teacher
from .tasks.pretraining import (
    PretrainingTask,
    join_images,
    refuse_large_head,
    refuse_other_target,
    refuse_other_tokens,
)
from .training.dry_run import RunEstimate
from .training.extension import describe_extension
from .weights.checkpoint import count_parameters
from .weights.schema import Extension


def pretrain(
    images: str | Path | Sequence[str | Path] | None,
    tokens: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    objective: str | None = None,
    teacher: SavedTeacher | None = None,
    init: str | Path | None = None,
    resume: str = "auto",
    extend: int | None = None,
    device: str = "auto",
) -> Path:
    """Pre-trains MaPeT (arXiv 2306.07346) and returns the folder of the last checkpoint.

    Under torchrun all processes work on one run; the batches and their contents do not depend on the world size.

    Args:
        images: A tar, a folder, a brace pattern of tars, or a list of tars; not needed if TOKENS holds the images.
        tokens: Token store of these images, local or a URL.
        out: Folder of the run: settings.yaml, run.json, metrics.jsonl, TensorBoard events, checkpoints/.
        recipe: Name of a shipped recipe, or a YAML file.
        overrides: A setting, such as optimizer.lr=1e-3; repeat for more.
        objective: mapet, pim or mim; the same as the setting objective.name (default: the recipe's).
        teacher: Codebook of the tokens, whose tower computes the targets of the control
            objective.target=features (in Python `mapet.read_tokenizer(CODEBOOK)`).
        init: Weights to start a new run from: a run, checkpoint, import, export or published .pth.tar. Positions are
            resampled to the model's grid; what the weights lack, or have for another K, starts fresh.
        resume: auto resumes the run in OUT from its newest whole checkpoint, if there is one; never refuses to.
        extend: Go on with the finished run in OUT until it has so many epochs in all, with a warm-up and a cosine of
            their own (the settings extension.*). Repeat the command to resume; give more epochs to extend it again.
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Raises:
        UsageError for settings that do not fit together or differ from those of the run to resume, DataError for
        images or tokens that are missing or damaged, or a loss that is not finite, FingerprintMismatch for tokens of
        another codebook than before, Interrupted after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    given = {"images": images, "tokens": tokens, "init": init, "resume": resume, "extend": extend, "out": out}
    settings = _settings(recipe, overrides, objective)
    device, out = choose_device(device), Path(out)
    with joined_world(device, {**given, **flat(settings)}) as world, sole_writer(out, world):
        store = TokenStore(tokens)
        world.refuse_differences({"the codebook of --tokens": store.fingerprint, "images in --tokens": len(store)})
        check_grid(store, settings.model)
        refuse_large_head(store, settings.model.dim)
        point = world.on_rank_zero(lambda: _resume_point(out, resume, extend, settings, store))
        task = _task(images, store, settings, teacher, device, world)
        run = open_run(task, out, point, init, device, world)
        with run.logbook:
            path = train(run)
        if world.is_first:
            show_run(path)
    return path


def _task(
    images: str | Path | Sequence[str | Path] | None,
    store: TokenStore,
    settings: Settings,
    saved: SavedTeacher | None,
    device: str,
    world: World,
) -> PretrainingTask:
    if saved is None:
        refuse_other_target(settings, TOKENS)
        return PretrainingTask(settings, store, join_images(images, store, settings, world))
    teacher = open_teacher(saved, settings, store, device, world)
    return FeatureRegression(settings, store, join_images(images, store, settings, world), saved, teacher)


def _resume_point(
    out: Path, resume: str, extend: int | None, settings: Settings, store: TokenStore
) -> ResumePoint | None:
    point = find_resume_point(
        out,
        resume,
        PretrainingTask.name,
        settings,
        resolve(),
        lambda before: refuse_other_tokens(out, before, store),
    )
    return extended(point, out, extend, settings.extension, settings)


def pretrain_dry_run(
    images: str | Path | Sequence[str | Path] | None,
    tokens: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    objective: str | None = None,
    teacher: SavedTeacher | None = None,
    extend: int | None = None,
    device: str = "auto",
) -> RunEstimate:
    """Estimates the steps, FLOPs, memory and time of a run, from ten measured steps. Nothing is written.

    Args:
        images: As for `pretrain`.
        tokens: As for `pretrain`.
        recipe: As for `pretrain`.
        overrides: As for `pretrain`.
        objective: As for `pretrain`.
        teacher: As for `pretrain`.
        extend: Refused: only a new run is estimated.
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Raises:
        UsageError, DataError and FingerprintMismatch as `pretrain` does.
    """
    if extend is not None:
        raise UsageError(
            f"--dry-run estimates a new run, not one that --extend {extend} goes on with; leave one of the two out."
        )
    given = {"images": images, "tokens": tokens}
    settings = _settings(recipe, overrides, objective)
    device = choose_device(device)
    with joined_world(device, {**given, **flat(settings)}) as world:
        store = TokenStore(tokens)
        check_grid(store, settings.model)
        task = _task(images, store, settings, teacher, device, world)
        return dry_run(task, world, device)


def _settings(recipe: str | Path | None, overrides: Sequence[str], objective: str | None) -> Settings:
    return resolve(recipe, [*overrides, *([] if objective is None else [f"objective.name={objective}"])])


def show_run(checkpoint: Path) -> None:
    """Prints a summary of the run that a checkpoint belongs to."""
    table("Pre-training", run_summary(checkpoint))


def run_summary(checkpoint: Path) -> list[tuple[str, str]]:
    """(name, value) rows about the run that a checkpoint belongs to, from its metrics.jsonl and run.json."""
    out = checkpoint.parents[1]
    lines, record = read_lines(out / "metrics.jsonl"), json.loads((out / "run.json").read_text())
    last = lines[-1]
    rows = [
        ("images", f"{record['images']:,}, {last['epoch']:g} epochs, {last['step']:,} steps"),
        ("parameters", f"{count_parameters(checkpoint):,}"),
    ]
    extensions = checked(record.get("extensions", []), list[Extension], out / "run.json")
    rows += [("extended", describe_extension(extension)) for extension in extensions]
    done = [line for line in lines if line["loss"] is not None]
    if done:
        rows += [
            ("loss", _change(done, "loss", "{:.3f}")),
            _predictions(done),
        ]
    skipped = sum(line["skipped_steps"] for line in lines)
    rows += [("steps skipped", str(skipped))] if skipped else []
    since = record["starts"][-1]["step"]
    rows += [("images/s", _speed([line for line in lines if line["step"] > since])), ("checkpoint", str(checkpoint))]
    return rows


def _predictions(lines: list[dict[str, Any]]) -> tuple[str, str]:
    if "cosine" in lines[-1]:
        return "cosine similarity", _change(lines, "cosine", "{:.4f}")
    return "masked-token accuracy", _change(lines, "accuracy", "{:.2%}")


def _change(lines: list[dict[str, Any]], name: str, form: str) -> str:
    first, last = lines[0], lines[-1]
    return f"{form.format(first[name])} (step {first['step']}) -> {form.format(last[name])} (step {last['step']})"


def _speed(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return "the run was complete already"
    speed, wait = (fmean(line[name] for line in lines) for name in ("images_per_second", "data_wait"))
    return f"{speed:.1f}, waiting for data {wait:.1%} of the time"
