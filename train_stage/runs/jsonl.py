"""Files of one JSON object per line, each with the step that it belongs to."""

import json
from pathlib import Path
from typing import Any

from ...shared.storage.files import written_whole


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Keeps the lines up to `step` and returns them; later steps are about to be computed again."""
    lines = [line for line in read_lines(path) if line["step"] <= step]
    with written_whole(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, up to one that a killed process left incomplete; [] without a file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Appends one line; the folder of the file is made if it is missing."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
