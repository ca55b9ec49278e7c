"""train report: one or several runs as a page to look at."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from ..shared.errors import DataError, UsageError
from ..shared.report.pictures import golden_colours, hex_colours
from ..shared.report.render import write_page
from ..shared.runtime.console import say, table
from .evaluation.predictions import predict
from .runs.jsonl import read_lines

CURVES = {
    "loss": "Loss (mean cross-entropy, nats)",
    "accuracy": "Accuracy: share of hidden tokens that were guessed",
    "lr": "Learning rate",
    "gradient_norm": "Gradient norm, before clipping",
    "images_per_second": "Throughput (images a second)",
    "data_wait": "Data wait: share of the time spent waiting for images",
    "mfu": "Model FLOPs utilisation",
    "memory_mb": "Peak memory (MiB)",
    "skipped_steps": "Steps that were skipped",
}
"""What is drawn over the steps of a run, as far as metrics.jsonl has it."""
_MOST_LINES = 2000


def report(
    runs: str | Path | Sequence[str | Path],
    *,
    html: str | Path | None = None,
    images: str | None = None,
    tokens: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Writes one or several runs side by side as one self-contained HTML file, and returns its path.

    Args:
        runs: folders of runs, finished or not.
        html: the file to write; default report.html in the first run's folder.
        images: held-out images: the page shows what the newest checkpoint of each run predicts for some of them, and
            how accuracy lies over the grid. Not needed for `tokens` that hold their images.
        tokens: the token store of these images, made with the runs' codebook.
        seed: of the images and patches that are predicted.
        device: "auto", "cpu" or "cuda".

    Raises:
        DataError for a folder that is no run, or images or tokens that do not fit; UsageError for options that do not.
    """
    folders = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if not folders:
        raise UsageError("No run was given; name the folder of one or several.")
    if images and not tokens:
        raise UsageError("--images needs --tokens, the token store of these images.")
    path = Path(html) if html is not None else folders[0] / "report.html"
    if path.is_dir():
        raise UsageError(f"--html {path} is a folder; give a file, such as {path / 'report.html'}.")
    read = [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    predicted = predict(folders, tokens, images, seed, device) if tokens else None
    _write(path, read, predicted)
    for run in read:
        table(f"Run {run['name']}", [("in", run["path"]), *((name, shown) for name, _, shown in run["figures"])])
    say(f"The page is {path} ({path.stat().st_size / 1e6:.1f} MB); it opens in any browser, without a network.")
    return path


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    names = [folder.absolute().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> dict[str, Any]:
    """All that a run's folder says, as plain JSON values."""
    lines = _lines(folder / "metrics.jsonl")
    if not lines:
        what = "has no line yet" if (folder / "metrics.jsonl").exists() else "is missing"
        raise DataError(f"{folder} is no run to report on: metrics.jsonl {what}; give what pretrain wrote to --out.")
    probes = _lines(folder / "probe.jsonl")
    return {
        "name": name,
        "path": str(folder),
        "lines": lines,
        "probes": probes,
        "settings": _settings(folder),
        "figures": _figures(lines, probes),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; numbers that are not finite become None."""
    try:
        lines = [line for line in read_lines(path) if isinstance(line, dict) and isinstance(line.get("step"), int)]
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from None
    return [{key: _finite(value) for key, value in line.items()} for line in lines]


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(folder: Path) -> dict[str, str]:
    """settings.yaml, flat: "optimizer.lr" -> "0.0015". Settings that this mapet does not know are shown as well."""
    try:
        content = yaml.safe_load((folder / "settings.yaml").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise DataError(f"{folder / 'settings.yaml'} cannot be read ({str(error).splitlines()[0]}).") from None
    return dict(_flat(content, ""))


def _flat(content: Any, prefix: str) -> list[tuple[str, str]]:
    if isinstance(content, Mapping):
        return [pair for key, value in content.items() for pair in _flat(value, f"{prefix}.{key}".lstrip("."))]
    return [(prefix, json.dumps(content, ensure_ascii=False) if isinstance(content, list) else str(content))]


def _figures(lines: list[dict[str, Any]], probes: list[dict[str, Any]]) -> list[tuple[str, float, str]]:
    """(name, number, how it is shown) of what a run came to, as far as it is known."""

    def all_of(key: str) -> list[float]:
        return [line[key] for line in lines if line.get(key) is not None]

    def last(found: list[dict[str, Any]], key: str) -> list[float]:
        return [line[key] for line in found if line.get(key) is not None][-1:]

    known = [
        ("steps", last(lines, "step"), "{:,}"),
        ("epochs", last(lines, "epoch"), "{:g}"),
        ("loss", last(lines, "loss"), "{:.3f}"),
        ("accuracy", last(lines, "accuracy"), "{:.1%}"),
        ("k-NN", last(probes, "knn"), "{:.1%}"),
        ("linear probe", last(probes, "linear"), "{:.1%}"),
        ("images a second", all_of("images_per_second") and [median(all_of("images_per_second"))], "{:,.0f}"),
        ("data wait", all_of("data_wait") and [fmean(all_of("data_wait"))], "{:.1%}"),
        ("MFU", all_of("mfu") and [median(all_of("mfu"))], "{:.1%}"),
        ("MiB at most", all_of("memory_mb") and [max(all_of("memory_mb"))], "{:,.0f}"),
        ("skipped steps", all_of("skipped_steps") and [sum(all_of("skipped_steps"))], "{:,}"),
    ]
    return [
        (name, numbers[0], shown.format(numbers[0]).replace("%", " %")) for name, numbers, shown in known if numbers
    ]


def _write(path: Path, runs: list[dict[str, Any]], predicted: dict[str, Any] | None) -> None:
    curves = {key: title for key, title in CURVES.items() if _is_drawn(runs, key)}
    data = {
        "runs": [{"name": run["name"], "lines": _thinned(run["lines"]), "probes": run["probes"]} for run in runs],
        "curves": curves,
        "predicted": predicted and {**predicted, "colours": hex_colours(golden_colours(predicted["k"]))},
    }
    names = ", ".join(run["name"] for run in runs)
    write_page(
        path,
        "run",
        title=f"{names}: mapet run{'s' if len(runs) > 1 else ''}",
        data=data,
        runs=runs,
        names=names,
        ranked=_is_ranked(runs),
        **_compared(runs),
    )


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most about 2,000 lines, the last one among them."""
    step = -(-len(lines) // _MOST_LINES)
    return lines[::-1][::step][::-1]


def _is_drawn(runs: list[dict[str, Any]], key: str) -> bool:
    values = [line.get(key) for run in runs for line in run["lines"]]
    return any(values) if key == "skipped_steps" else any(value is not None for value in values)


def _is_ranked(runs: list[dict[str, Any]]) -> bool:
    return any(line.get("accuracy_by_rank") for run in runs for line in run["lines"])


def _compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings as (name, value of each run): those in which the runs differ, and those that they share."""
    names = dict.fromkeys(name for run in runs for name in run["settings"])
    rows = [(name, [run["settings"].get(name, "") for run in runs]) for name in names]
    return {
        "different": [row for row in rows if len(set(row[1])) > 1],
        "shared": [(name, values[0]) for name, values in rows if len(set(values)) == 1],
    }
