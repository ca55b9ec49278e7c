"""RUN/run.json: how a run was started and resumed, so that the folder is enough to repeat it."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...shared.errors import DataError
from ...shared.storage.files import written_whole
from ...shared.storage.remote import without_query

_PACKAGE = Path(__file__).parents[2]
_LIBRARIES = ("mapet", "torch", "torchvision", "timm", "numpy", "pillow")


def write_record(out: Path, step: int, metadata: dict[str, Any]) -> None:
    """Adds an entry to `starts` in RUN/run.json: command, versions and state of the code that starts at `step`.

    `metadata` is what does not change between starts: data, tokens, codebook.
    """
    path = out / "run.json"
    try:
        starts = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        starts = []
    start = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [without_query(word) for word in sys.argv],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _LIBRARIES},
        "git": git_state(_PACKAGE),
    }
    with written_whole(path) as partial:
        partial.write_text(json.dumps({**metadata, "starts": [*starts, start]}, indent=1) + "\n")


def refuse_deleted(out: Path) -> None:
    """DataError if the run's folder was deleted or moved: what is written later would lack what was written before."""
    if not (out / "run.json").exists():
        raise DataError(
            f"{out} was deleted or moved while the run was writing to it, so it stopped; give the same command again "
            "to begin a new run there, or move the folder back to resume it."
        )


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout at `folder` and the files that differ from it; None if `folder` is not a checkout."""
    if not (folder / ".git").exists():
        return None
    try:
        commit, changed = (
            subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout  # noqa: S603, S607 (fixed words, no shell; git is whichever the user has)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.strip(), "changed": [line[3:] for line in changed.splitlines()]}
