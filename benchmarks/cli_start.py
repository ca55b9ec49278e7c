"""How long `mapet --help` takes, as a ratio to `python -c pass` in the same run. Prints one JSON line.

python benchmarks/cli_start.py
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

PAIRS = 15


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    beside = Path(sys.executable).parent / "mapet"
    script = str(beside) if beside.exists() else shutil.which("mapet")
    if script is None:
        sys.exit("mapet is not installed in this environment; pip install -e . first.")
    ours, reference = [script, "--help"], [sys.executable, "-c", "pass"]
    for command in (ours, reference):
        seconds(command)
    pairs = [(seconds(ours), seconds(reference)) for _ in range(PAIRS)]
    figure = {
        "figure": "mapet --help / python -c pass, wall time",
        "ratio_median": round(statistics.median(a / b for a, b in pairs), 2),
        "mapet_help_seconds": round(statistics.median(a for a, _ in pairs), 4),
        "python_pass_seconds": round(statistics.median(b for _, b in pairs), 4),
        "target": "at most 20",
        "pairs": PAIRS,
    }
    print(json.dumps(figure))


if __name__ == "__main__":
    main()
