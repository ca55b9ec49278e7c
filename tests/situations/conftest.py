"""Situations: what people really have and type, given to the command line, with the right outcome kept as a test.

Each test is one situation; the first line of its docstring describes it. `mapet` runs a command in this process. With
MAPET_OF=FOLDER every command runs in a process of its own with the package FOLDER/mapet instead, so that the same
situations can be given to another version; with SITUATIONS_TABLE=FILE each test adds a JSON line to FILE: its name,
description, the outcome of its last command, and whether the test passed (`scripts/situations.py` makes a table of two
such files).
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mapet.quickstart.drawings import write_drawings
from PIL import Image

from ..warm import COLD_COMMAND, warm_command

OTHER_PACKAGE = os.environ.get("MAPET_OF")
TABLE = os.environ.get("SITUATIONS_TABLE")
LONGEST = 120
"""Seconds that a command may take in a process of its own."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    def ok(self) -> "Outcome":
        """Asserts that the command succeeded."""
        assert self.exit_code == 0, self.stderr
        assert "Traceback" not in self.stderr
        return self

    def refused(self, exit_code: int, *parts: str) -> "Outcome":
        """Asserts that the command ended with this code and one sentence that contains all `parts`."""
        assert "Traceback" not in self.stderr, self.stderr
        assert self.exit_code == exit_code, f"exit code {self.exit_code}: {self.stderr}{self.stdout}"
        sentence = self.sentence
        missing = [part for part in parts if part not in sentence]
        assert not missing, f"{missing} not in {sentence!r}"
        return self

    @property
    def sentence(self) -> str:
        """The last line on stderr, which states why a command failed."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @property
    def text(self) -> str:
        """Everything that was printed."""
        return self.stdout + self.stderr


_outcomes: list[Outcome] = []


def _run_here(arguments: list[str], cwd: Path | None) -> Outcome:
    from mapet import cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals() if number > 2 or number == 2}
    argv, began = sys.argv, time.monotonic()
    try:
        sys.argv = ["mapet", *arguments]
        with contextlib.chdir(cwd or Path.cwd()), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
    return Outcome(code, out.getvalue(), err.getvalue(), time.monotonic() - began)


def _environment() -> dict[str, str]:
    return dict(os.environ) if OTHER_PACKAGE is None else {**os.environ, "PYTHONPATH": OTHER_PACKAGE}


# Variables that nothing reads before the command runs.
WARM_VARIABLES = ("HF_", "WANDB_", "HOME", "NETRC")


def _start(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    cold = OTHER_PACKAGE is not None or not all(name.startswith(WARM_VARIABLES) for name in environment)
    return subprocess.Popen(
        [*(COLD_COMMAND if cold else warm_command()), *map(str, arguments)],
        cwd=cwd,
        env=_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen, seconds: float = LONGEST) -> Outcome:
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        code, err = 124, err + f"\nstill running after {seconds:.0f} s"
    outcome = Outcome(code, out, err, time.monotonic() - began)
    _outcomes.append(outcome)
    return outcome


def _mapet(*arguments: object, cwd: Path | None = None, process: bool = False, **environment: str) -> Outcome:
    if process or environment or OTHER_PACKAGE is not None:
        return _finish(_start(*arguments, cwd=cwd, **environment))
    outcome = _run_here([str(argument) for argument in arguments], cwd)
    _outcomes.append(outcome)
    return outcome


@pytest.fixture(scope="session")
def mapet() -> Callable[..., Outcome]:
    """mapet("tokenize", "inspect", path, cwd=None, process=False, NAME="value of an environment variable")

    Runs in this process, in one of its own with `process` or an environment.
    """
    return _mapet


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen]:
    """start("train", "pretrain", ...): the command in a process of its own; `finish(process)` waits for it."""
    return _start


@pytest.fixture(scope="session")
def finish() -> Callable[..., Outcome]:
    """finish(process, seconds=120): the outcome of a started command; exit code 124 if it had to be killed."""
    return _finish


def _picture(seed: int = 0, format: str = "JPEG", width: int = 64, height: int = 64) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """picture(seed=0, format="JPEG", width=64, height=64): the bytes of a smooth random picture."""
    return _picture


@dataclass(frozen=True)
class Lab:
    """Whole artifacts, made by the command line. Never write into them; copy what a situation changes."""

    tower: str
    images: Path
    """Two tars of 24 labelled drawings (64 px), classes 0 to 11."""
    codebook: Path
    """K = 16, 8x8 grid."""
    tokens: Path
    run: Path
    """A finished run of a tiny MIM model with two checkpoints."""

    TINY = (
        "model.name=null",
        "model.dim=32",
        "model.depth=1",
        "model.heads=2",
        "model.image_size=64",
        "model.patch_size=8",
        "train.batch_size=16",
        "train.epochs=2",
        "optimizer.warmup_epochs=0",
        "train.log_every=1",
        "optimizer.warmup_epochs=0",
    )

    @property
    def settings(self) -> list[str]:
        """The options of a tiny pre-training."""
        return [word for setting in self.TINY for word in ("--set", setting)]


@pytest.fixture(scope="session")
def lab(tower: str, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    root = tmp_path_factory.mktemp("lab")
    made = Lab(tower, root / "images", root / "codebook", root / "tokens", root / "run")
    write_drawings(made.images, 48, seed=11, per_tar=24)
    options = ["--tower", tower, "--k", 16, "--restarts", 1, "--iterations", 3]
    _mapet("tokenize", "build-codebook", made.images, *options, "--out", made.codebook).ok()
    _mapet("tokenize", "encode-shards", made.images, "--codebook", made.codebook, "--out", made.tokens).ok()
    _mapet(
        "train", "pretrain", "--images", made.images, "--tokens", made.tokens, "--out", made.run, *made.settings
    ).ok()
    return made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if TABLE and report.when == "call" and not report.skipped:
        last = _outcomes[-1] if _outcomes else None
        line = {
            "file": item.path.name,
            "name": item.name,
            "situation": ((item.function.__doc__ or item.name).strip().splitlines() or [""])[0],
            "exit_code": last and last.exit_code,
            "traceback": bool(last and "Traceback" in last.stderr),
            "sentence": last and last.sentence[:300],
            "passed": report.passed,
        }
        with open(TABLE, "a") as table:
            table.write(json.dumps(line) + "\n")
    if report.when == "teardown":
        _outcomes.clear()
    return report
