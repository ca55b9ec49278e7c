"""World: shares of items, small collectives, and errors that one process reports for all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapet.shared.errors import DataError, UsageError
from mapet.shared.runtime.distributed import World, collective_timeout, joined_world

from ...warm import warm_python, warm_torchrun

TALK = """
import sys
from mapet.cli import _fail
from mapet.shared.runtime.console import running_command, say
from mapet.shared.errors import DataError
from mapet.shared.runtime.distributed import joined_world

def refuse_in_all_but_the_first(rank):
    if rank:
        raise DataError(f"process {rank} cannot")

with joined_world() as world:
    assert world.all_gather(world.rank * 10) == [0, 10, 20]
    assert world.on_rank_zero(lambda: f"of {world.rank}") == "of 0"
    assert world.all_or_raise(lambda: world.rank) == world.rank
    world.wait()
    with running_command():
        say("only one says this")
    try:
        world.all_or_raise(lambda: refuse_in_all_but_the_first(world.rank))
    except DataError as error:
        _fail(str(error), error.exit_code)
"""


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_differ_by_at_most_one_item_and_cover_all(items: list[int], size: int):
    shares = [World(rank, size).shard(items) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_world_of_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_world() as world:
        assert (world.rank, world.size, world.is_first) == (0, 1, True)
        assert (world.all_gather("a"), world.on_rank_zero(lambda: "b"), world.all_or_raise(lambda: "c")) == (
            ["a"],
            "b",
            "c",
        )
        world.wait()
        for ask in (world.on_rank_zero, world.all_or_raise):
            with pytest.raises(DataError, match="no"):
                ask(lambda: refuse())


def refuse() -> None:
    raise DataError("no")


def test_a_world_size_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="start several processes with torchrun"), joined_world():
        pass


TWO = """
import os, signal, sys, time
from pathlib import Path
from mapet.cli import _fail
from mapet.shared.errors import MapetError
from mapet.shared.runtime import distributed
from mapet.shared.runtime.console import running_command

distributed._SECONDS_BETWEEN_BEATS, distributed._GRACE_SECONDS = 0.2, 0.5
task, folder = sys.argv[1], Path(sys.argv[2])
signal.signal(signal.SIGTERM, signal.default_int_handler)
with running_command():
    try:
        with distributed.joined_world(given={"seed": 0, "workers": os.environ["RANK"]}) as world:
            import torch

            if task == "slow":
                assert world.on_rank_zero(lambda: time.sleep(4)) is None
                (folder / str(world.rank)).touch()
            if task == "differ":
                world.refuse_differences({"--codebook": f"book {world.rank}"})
            if task == "hang" and world.is_first:
                torch.distributed.barrier()
            elif task == "hang":
                time.sleep(20)
            if task == "silent" and world.rank == 1:
                distributed._SECONDS_BETWEEN_BEATS = 1e9
                time.sleep(20)
            world.wait()
            if task == "orphan":
                (folder / str(os.getpid())).touch()
                torch.distributed.barrier() if world.is_first else time.sleep(600)
    except MapetError as error:
        _fail(str(error), error.exit_code)
"""


def in_two(tmp_path: Path, task: str, minutes: float) -> subprocess.Popen:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "MAPET_TIMEOUT_MINUTES": str(minutes)}
    return subprocess.Popen(
        [*launch, sys.executable, script, task, tmp_path], stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("differ", "must be started alike: --codebook is book 0 in process 0 and book 1 in process 1; give all"),
        ("hang", "mapet: Process 0 of 2 waited 0.04 minutes for another one, which lives and does not answer; see"),
        ("silent", "mapet: Process 1 of 2 has shown no sign of life for 0.04 minutes; see whether its machine is up"),
    ],
)
def test_processes_that_disagree_or_do_not_answer_end_with_one_sentence(tmp_path: Path, task: str, sentence: str):
    _, text = in_two(tmp_path, task, 0.04).communicate(timeout=60)
    assert text.count(sentence) == 1, text


@pytest.mark.campaign
def test_a_process_that_lives_is_waited_for_longer_than_a_collective_may_take(tmp_path: Path):
    process = in_two(tmp_path, "slow", 0.04)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 0, text
    assert {path.name for path in tmp_path.iterdir()} == {"two.py", "0", "1"}


@pytest.mark.campaign
def test_processes_whose_torchrun_was_killed_end_soon_also_inside_a_collective(tmp_path: Path):
    process = in_two(tmp_path, "orphan", 10)
    deadline = time.monotonic() + 60
    pids: list[int] = []
    while len(pids) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        pids = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while (living := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (len(pids), living) == (2, [])


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("minutes", ["0", "-1", "soon", "nan"])
def test_a_time_out_that_is_no_number_of_minutes_is_refused(monkeypatch: pytest.MonkeyPatch, minutes: str):
    monkeypatch.setenv("MAPET_TIMEOUT_MINUTES", minutes)
    with pytest.raises(UsageError, match=f"MAPET_TIMEOUT_MINUTES is '{minutes}'; set it to a number of minutes"):
        collective_timeout()


def test_three_processes_exchange_values_and_one_reports_an_error(tmp_path: Path):
    script = tmp_path / "talk.py"  # torchrun prints the command of a process that failed
    script.write_text(TALK)
    launch = [*warm_torchrun(), "--standalone", "--nproc-per-node", "3", "--no-python"]
    ran = subprocess.run([*launch, *warm_python(), script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "AssertionError" not in ran.stderr
    assert ran.stderr.count("only one says this") == 1
    assert (ran.stderr.count("mapet: process 1 cannot"), ran.stderr.count("process 2 cannot")) == (1, 0)
