"""Files of one JSON object per line, each with the step that it belongs to."""

import json
from pathlib import Path
from typing import Any

from ...shared.runtime.console import say
from ...shared.storage.files import written_whole

_DAMAGED = ".damaged"


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keeps the lines up to `step` and returns them; later steps are about to be computed again.

    An unfinished last line, as a killed process leaves it, is dropped. Any other line that is not a JSON object with a
    step is moved to NAME.damaged.jsonl, and a message says so.
    """
    lines, damaged = _parsed(path)
    if damaged:
        aside = path.with_name(f"{path.stem}{_DAMAGED}{path.suffix}")
        with open(aside, "ab") as file:
            file.write(b"".join(line + b"\n" for line in damaged))
        say(f"{path} has {len(damaged)} damaged or foreign line(s); they are kept in {aside}, and all others here.")
    lines = [line for line in lines if line["step"] <= step]
    with written_whole(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file without those that are unfinished, damaged or foreign; [] without a file."""
    return _parsed(path)[0]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends one line; the folder of the file is made if it is missing."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def logs(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern, without those that damaged lines were moved to."""
    return [path for path in sorted(folder.glob(pattern)) if not path.stem.endswith(_DAMAGED)]


def _parsed(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The lines of a file, and those that are not JSON objects with a step, as they are; the last line is only read if
    it ends with a line break or is whole."""
    if not path.exists():
        return [], []
    lines, damaged = [], []
    *texts, last = path.read_bytes().split(b"\n")
    for text in texts:
        line = _line(text)
        if line is not None:
            lines.append(line)
        elif text.strip():
            damaged.append(text)
    line = _line(last)
    return lines + ([] if line is None else [line]), damaged


def _line(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)  # of the encodings that JSON allows
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if isinstance(step, int) and not isinstance(step, bool) else None
