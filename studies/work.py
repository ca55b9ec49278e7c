"""The work of one process on a study: it takes the next step that is unclaimed and ready, until none is left."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..shared.errors import DataError, Interrupted
from ..shared.runtime.console import progress, say
from ..shared.storage.files import written_whole
from ..shared.storage.lock import claimed
from .graph import CLASSIFIER, OUTPUT, PROBE, Graph, Step

RESULT, LOG = "result.json", "log.txt"
SECONDS_BETWEEN_LOOKS = 1.0
_PRINTED = "printed.json"
_COMMAND = "from mapet.cli import main; main()"
_SHARED_COMMANDS = ("build-codebook", "encode-shards", "pretrain", "finetune")
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--no-python")
_SHOWN_OF_LOG = 400


def work(graph: Graph, root: Path, processes: int = 1) -> None:
    """Makes every step, with other processes that do the same.

    A step is claimed by the lock of its folder; a killed process releases its claims. Steps of other processes are
    waited for. `processes` of torchrun work on each command that several processes can share.

    Raises:
        DataError if a step's command fails, naming its log; Interrupted after Ctrl-C or SIGTERM.
    """
    with progress("steps", len(graph.steps), "steps") as advance:
        counted: set[str] = set()
        while True:
            done = {folder for folder in graph.steps if (root / folder / RESULT).exists()}
            advance(len(done - counted))
            counted = done
            left = [step for folder, step in graph.steps.items() if folder not in done]
            if not left:
                return
            ready = [step for step in left if done.issuperset(step.needs)]
            if not any(_taken(step, root, processes) for step in ready):
                time.sleep(SECONDS_BETWEEN_LOOKS)


def read_result(root: Path, folder: str) -> dict[str, Any]:
    """What a finished step measured. Raises DataError if its file cannot be read."""
    path = root / folder / RESULT
    try:
        result = json.loads(path.read_text())
        if not isinstance(result, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and give the same command again.") from None
    return result


def _taken(step: Step, root: Path, processes: int) -> bool:
    """Makes a step unless another process has claimed it, or has left a command that still writes its artifact."""
    folder = root / step.folder
    with claimed(folder) as is_claimed:
        if not is_claimed or (folder / RESULT).exists():
            return False
        with claimed(folder / OUTPUT) as is_free:
            if not is_free:
                return False
        _make(step, folder, processes)
        return True


def _make(step: Step, folder: Path, processes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    printed, log = folder / _PRINTED, folder / LOG
    words = step.words if step.kind == PROBE else (*step.words, "--out", str(folder / OUTPUT))
    say(f"{step.folder}: mapet {' '.join(words[:2])}")
    printed.unlink(missing_ok=True)  # a command that outlived a killed study may still write to the old file
    with printed.open("w") as out, log.open("a") as err:
        before = err.tell()
        code = _run([*_launcher(words[1], processes), sys.executable, "-c", _COMMAND, *words], out, err)
    if code:
        said = _last_line(log, before)
        raise DataError(f"{folder / LOG}: the command of this step ended with exit code {code} ({said})")
    result = {"kind": step.kind, "seconds": round(time.monotonic() - began, 1), "scores": _scores(step, folder)}
    with written_whole(folder / RESULT) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")


def _run(command: Sequence[str], out: Any, err: Any) -> int:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)  # noqa: S603 (this package's own command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise Interrupted("stopped. What was finished is kept; give the same command to go on.") from None


def _launcher(command: str, processes: int) -> list[str]:
    if processes == 1 or command not in _SHARED_COMMANDS:
        return []
    return [sys.executable, *_TORCHRUN, "--nproc-per-node", str(processes)]


def _last_line(log: Path, before: int) -> str:
    """What the command said last, after `before` bytes of earlier attempts; torchrun adds a report of its own."""
    said_now = log.read_bytes()[before:].decode(errors="replace")
    lines = said_now.strip().splitlines() or ["nothing was printed"]
    of_mapet = [line.removeprefix("mapet: ") for line in lines if line.startswith("mapet: ")]
    return (of_mapet or lines)[-1][-_SHOWN_OF_LOG:]


def _scores(step: Step, folder: Path) -> dict[str, dict[str, float]]:
    """Top-1 accuracies in [0, 1] by features and evaluation."""
    if step.kind == PROBE:
        rows = json.loads((folder / _PRINTED).read_text())["rows"]
        return {row["features"]: _top1(row["evaluations"]) for row in rows}
    if step.kind == CLASSIFIER:
        last = (folder / OUTPUT / "probe.jsonl").read_text().splitlines()[-1]
        return {"classifier": {"finetuned": json.loads(last)["top1"]}}
    return {}


def _top1(evaluations: list[dict[str, Any]]) -> dict[str, float]:
    return {one["name"]: one["numbers"]["top1"] for one in evaluations if "top1" in one["numbers"]}
