"""report: writes one or several runs as an HTML page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec

from ..shared.artifacts.fields import read_json
from ..shared.artifacts.yaml_file import read_yaml
from ..shared.errors import DataError, UsageError
from ..shared.report.pictures import golden_colours, hex_colours
from ..shared.report.render import say_page, write_page
from ..shared.runtime.console import table
from ..shared.storage.files import refuse_folder
from ..shared.storage.lock import sole_writer
from .evaluation.predictions import predict
from .runs.jsonl import read_lines
from .runs.schema import checked_line
from .training.extension import describe_extension
from .weights.schema import Extension

CURVES = {
    "loss": "Loss (mean cross-entropy, nats)",
    "accuracy": "Accuracy: share of the training predictions that are correct",
    "cosine": "Cosine similarity of predicted features and the tower's",
    "lr": "Learning rate",
    "gradient_norm": "Gradient norm, before clipping",
    "images_per_second": "Throughput (images per second)",
    "data_wait": "Data wait: share of the time spent waiting for images",
    "mfu": "Model FLOPs utilisation",
    "memory_mb": "Peak memory (MiB)",
    "skipped_steps": "Steps that were skipped",
}
"""Title of each metric that is drawn over the steps of a run, if metrics.jsonl has it."""
_MOST_LINES = 2000
"""About how many lines of a run are drawn."""


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder holds, as plain JSON values."""

    name: str
    path: str
    lines: list[dict[str, Any]]
    """metrics.jsonl"""
    probes: list[dict[str, Any]]
    """probe.jsonl"""
    settings: dict[str, str]
    """settings.yaml, flat: "optimizer.lr" -> "0.0015"."""
    extensions: list[str]
    """Those that run.json lists, in words."""

    @property
    def figures(self) -> list[tuple[str, float, str]]:
        """(name, number, number as text) of the run's outcome, as far as it is known."""
        return _figures(self.lines, self.probes)


def report(
    runs: str | Path | Sequence[str | Path],
    *,
    html: str | Path | None = None,
    images: str | Path | Sequence[str | Path] | None = None,
    tokens: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Writes one or several runs side by side as one self-contained HTML file.

    The page shows curves, probes and settings and, if `tokens` are given, what the newest checkpoint of each run
    predicts for held-out images.

    Args:
        runs: Folders of runs, finished or not; several are shown side by side.
        html: The page to write (default: report.html in the first run's folder).
        images: The held-out images; not needed if `tokens` holds them.
        tokens: Token store of held-out images, made with the runs' codebook.
        seed: Seed of the images and patches that are predicted.
        device: Where the model runs: auto (CUDA if it is there), cpu or cuda.

    Returns:
        The page.

    Raises:
        DataError for a folder that is not a run, or images or tokens that do not fit; UsageError for options that do
        not.
    """
    folders = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if not folders:
        raise UsageError("No run is named; give the folders of one or several runs.")
    if images and not tokens:
        raise UsageError("--images needs --tokens, the token store of these images.")
    path = Path(html) if html is not None else folders[0] / "report.html"
    refuse_folder(path, "--html", "report.html")
    with sole_writer(path, option="--html"):
        summaries = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
        predictions = predict(folders, tokens, images, seed, device) if tokens else None
        write_runs(path, summaries, predictions)
        show_report(summaries, path)
    return path


def show_report(runs: Sequence[RunSummary], page: Path) -> None:
    """Prints the outcome of each run, and where the page is."""
    for run in runs:
        table(f"Run {run.name}", [("in", run.path), *((name, text) for name, _, text in run.figures)])
    say_page(page)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def read_run(folder: Path, name: str) -> RunSummary:
    """What the page of a run shows. Raises DataError for a folder that is not a run, or has no line of metrics yet."""
    lines = _lines(folder / "metrics.jsonl")
    if not lines:
        problem = "has no line yet" if (folder / "metrics.jsonl").exists() else "is missing"
        raise DataError(f"{folder} cannot be reported: metrics.jsonl {problem}; give the folder of pretrain's --out.")
    return RunSummary(name, str(folder), lines, _lines(folder / "probe.jsonl"), _settings(folder), _extensions(folder))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that have a step; numbers that are not finite become None."""
    try:
        contents: list[Any] = list(read_lines(path))
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from None
    lines = [line for line in contents if isinstance(line, dict) and isinstance(line.get("step"), int)]
    for line in lines:
        checked_line(line, path)
    return [{key: _finite(value) for key, value in line.items()} for line in lines]


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(folder: Path) -> dict[str, str]:
    """settings.yaml, flat, with settings that this version does not know; {} without the file."""
    path = folder / "settings.yaml"
    return dict(_flat(read_yaml(path), "")) if path.exists() else {}


class _Record(msgspec.Struct):
    """run.json, as far as the page shows it."""

    extensions: list[Extension] = []


def _extensions(folder: Path) -> list[str]:
    path = folder / "run.json"
    found = read_json(path, _Record, "the record of a run").extensions if path.exists() else []
    return [describe_extension(extension) for extension in found]


def _flat(content: Any, prefix: str) -> list[tuple[str, str]]:
    if isinstance(content, Mapping):
        return [pair for key, value in content.items() for pair in _flat(value, f"{prefix}.{key}".lstrip("."))]
    return [(prefix, json.dumps(content, ensure_ascii=False) if isinstance(content, list) else str(content))]


def _figures(lines: list[dict[str, Any]], probes: list[dict[str, Any]]) -> list[tuple[str, float, str]]:
    def all_of(key: str) -> list[float]:
        return [line[key] for line in lines if line.get(key) is not None]

    def last(records: list[dict[str, Any]], key: str) -> list[float]:
        return [record[key] for record in records if record.get(key) is not None][-1:]

    figures = [
        ("steps", last(lines, "step"), "{:,}"),
        ("epochs", last(lines, "epoch"), "{:g}"),
        ("loss", last(lines, "loss"), "{:.3f}"),
        ("accuracy", last(lines, "accuracy"), "{:.1%}"),
        ("cosine", last(lines, "cosine"), "{:.3f}"),
        ("k-NN", last(probes, "knn"), "{:.1%}"),
        ("linear probe", last(probes, "linear"), "{:.1%}"),
        ("validation, top-1", last(probes, "top1"), "{:.1%}"),
        ("images per second", all_of("images_per_second") and [median(all_of("images_per_second"))], "{:,.0f}"),
        ("data wait", all_of("data_wait") and [fmean(all_of("data_wait"))], "{:.1%}"),
        ("MFU", all_of("mfu") and [median(all_of("mfu"))], "{:.1%}"),
        ("peak MiB", all_of("memory_mb") and [max(all_of("memory_mb"))], "{:,.0f}"),
        ("skipped steps", all_of("skipped_steps") and [sum(all_of("skipped_steps"))], "{:,}"),
    ]
    return [
        (name, numbers[0], form.format(numbers[0]).replace("%", " %")) for name, numbers, form in figures if numbers
    ]


def write_runs(path: Path, runs: list[RunSummary], predictions: dict[str, Any] | None = None) -> None:
    """Writes the page of some runs, without a lock. Raises DataError if it cannot be written."""
    curves = {key: title for key, title in CURVES.items() if _is_drawn(runs, key)}
    if "cosine" in curves:
        curves["loss"] = "Loss (mean cross-entropy in nats; of features, 1 - mean cosine similarity)"
    data = {
        "runs": [{"name": run.name, "lines": _thinned(run.lines), "probes": run.probes} for run in runs],
        "curves": curves,
        "predicted": predictions and {**predictions, "colours": hex_colours(golden_colours(predictions["k"]))},
    }
    names = ", ".join(run.name for run in runs)
    write_page(
        path,
        "run",
        title=f"{names}: mapet run{'s' if len(runs) > 1 else ''}",
        data=data,
        runs=runs,
        names=names,
        ranked=_is_ranked(runs),
        probed=_is_probed(runs, "knn", "linear"),
        validated=_is_probed(runs, "top1"),
        **_compared(runs),
    )


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about 2,000 lines at equal distances, with the last one."""
    step = -(-len(lines) // _MOST_LINES)
    return lines[::-1][::step][::-1]


def _is_drawn(runs: list[RunSummary], key: str) -> bool:
    values = [line.get(key) for run in runs for line in run.lines]
    return any(values) if key == "skipped_steps" else any(value is not None for value in values)


def _is_probed(runs: list[RunSummary], *keys: str) -> bool:
    return any(line.get(key) is not None for run in runs for line in run.probes for key in keys)


def _is_ranked(runs: list[RunSummary]) -> bool:
    return any(line.get("accuracy_by_rank") for run in runs for line in run.lines)


def _compared(runs: list[RunSummary]) -> dict[str, Any]:
    """The settings in which the runs differ, (name, value of each run), and those that they share, (name, value)."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, [run.settings.get(name, "") for run in runs]) for name in names]
    return {
        "different": [row for row in rows if len(set(row[1])) > 1],
        "shared": [(name, values[0]) for name, values in rows if len(set(values)) == 1],
    }
