"""study: tokenizers, objectives, models and seeds compared under one protocol, by the project's own commands."""

import json
from pathlib import Path
from typing import Any

from msgspec import ValidationError, convert, to_builtins

from ..quickstart.drawings import write_drawings
from ..shared.errors import DataError, UsageError
from ..shared.report.render import say_page
from ..shared.runtime.console import results, say
from ..shared.runtime.devices import refuse_many_processes
from ..shared.sources.sources import read_records
from ..shared.storage.files import written_whole
from ..shared.storage.lock import sole_writer
from .graph import Inputs, build_graph
from .page import write_study_page
from .schema import Drawings, Study, read_study
from .scores import StudyResult, collect
from .tables import show_table, to_csv, to_latex, to_markdown
from .work import work

_PLAN = "study.json"
_SEED_OF_VAL = 500


def study(
    study: str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    val: str | Path | None = None,
    device: str = "auto",
    processes: int = 1,
) -> StudyResult:
    """Makes all cells of a study and writes their table to `out`, as results.html, .md, .csv, .tex and .json.

    Every step is a command of `mapet` in a process of its own; its artifact, its log and its result are in a folder of
    `out`, named by the content of its settings, and serve all cells that need them. The same call resumes a stopped
    one. Several processes or machines that are given the same call share the work, and end with the same table.

    Args:
        study: A shipped study (smoke, tiny, tiny-rows or paper-imagenet) or a YAML file.
        out: Folder of the study.
        images: Labelled training images, as for `pretrain` and `probe`; not needed if the study draws its own.
        val: Labelled images that each cell is measured on.
        device: Where models run: auto (CUDA if it is there), cpu or cuda.
        processes: Processes that share each tokenization, pre-training and fine-tuning, started by torchrun: as many as
            this machine has GPUs.

    Returns:
        The figures of every cell, and their summary over seeds.

    Raises:
        UsageError: settings that do not fit together, missing options, or an `out` of another study.
        DataError: the study's file is wrong, images cannot be read, or a step's command failed.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    refuse_many_processes()
    if processes < 1:
        raise UsageError(f"--processes {processes} must be at least 1.")
    plan, out = read_study(study), Path(out).absolute()
    inputs = _inputs(plan, out, images, val, device)
    graph = build_graph(plan, inputs)
    say(f"{len(graph.cells)} cells, made by {len(graph.steps)} steps in {out}.")
    work(graph, out, processes)
    result = collect(plan, graph, inputs)
    _write(result)
    say_page(write_study_page(result, graph))
    return result


def which_study(*, out: str | None, flops_per_second: float | None) -> str:
    """The function that `mapet study` calls if it is not a dry run. Raises UsageError for options that do not fit."""
    if out is None:
        raise UsageError("--out is missing: give the folder of the study, or --dry-run.")
    if flops_per_second is not None:
        raise UsageError("--flops-per-second goes with --dry-run.")
    return "study"


def show(result: StudyResult, *, as_json: bool = False) -> None:
    """Prints the table, or every figure as JSON."""
    if as_json:
        results.print_json(result.to_json())
    else:
        show_table(result)


def _inputs(plan: Study, out: Path, images: str | Path | None, val: str | Path | None, device: str) -> Inputs:
    """What the steps read. The first process notes it in `out`, where the next ones find it."""
    if plan.drawings is None and (images is None or val is None):
        raise UsageError("The study needs images: give --images and --val.")
    if plan.drawings is not None and (images is not None or val is not None):
        raise UsageError("The study draws its own images; leave out --images and --val.")
    given = {"study": to_builtins(plan), "images": None if images is None else str(images), "val": val and str(val)}
    drawn = out / "images"
    train, held_out = (str(images), str(val)) if plan.drawings is None else (str(drawn / "train"), str(drawn / "val"))
    with sole_writer(out / _PLAN):
        noted = _noted(out / _PLAN)
        if noted is None:
            count = plan.drawings.train if plan.drawings else plan.train_images or len(read_records(train))
            build_graph(plan, Inputs(train, held_out, count, out, device))  # refuses what is wrong before it is noted
            if plan.drawings is not None:
                _draw(plan.drawings, train, held_out)
            noted = {**given, "count": count}
            with written_whole(out / _PLAN) as partial:
                partial.write_text(json.dumps(noted, indent=1) + "\n")
    if {**given, "study": plan} != {**{name: noted.get(name) for name in given}, "study": _study_of(noted)}:
        raise UsageError(f"--out {out} holds another study or one of other images; choose another --out or delete it.")
    return Inputs(train, held_out, noted["count"], out, device)


def _noted(path: Path) -> dict[str, Any] | None:
    try:
        noted = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and give the same command again.") from None
    if not isinstance(noted, dict) or not isinstance(noted.get("count"), int):
        raise DataError(f"{path} is not what mapet study wrote; delete it and give the same command again.")
    return noted


def _study_of(noted: dict[str, Any]) -> Study | None:
    """The study that another process, perhaps of an earlier version, noted."""
    try:
        return convert(noted.get("study"), Study)
    except ValidationError:
        return None


def _draw(drawings: Drawings, train: str, val: str) -> None:
    for folder, count, seed in ((Path(train), drawings.train, 0), (Path(val), drawings.val, _SEED_OF_VAL)):
        write_drawings(folder, count, seed=seed, prefix=folder.name)


def _write(result: StudyResult) -> None:
    for name, text in (
        ("results.csv", to_csv(result)),
        ("results.md", to_markdown(result)),
        ("results.tex", to_latex(result)),
        ("results.json", json.dumps(result.to_json(), indent=1) + "\n"),
    ):
        with sole_writer(result.root / name), written_whole(result.root / name) as partial:
            partial.write_text(text, encoding="utf-8")
    say(f"The table is in {result.root}: results.md, results.csv, results.tex, results.json.")
