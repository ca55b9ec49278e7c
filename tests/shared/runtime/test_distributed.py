"""World: shares of items, small collectives, and errors that one process reports for all."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mapet.shared.errors import DataError, UsageError
from mapet.shared.runtime.distributed import World, joined_world

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


def test_three_processes_exchange_values_and_one_reports_an_error(tmp_path: Path):
    script = tmp_path / "talk.py"  # torchrun prints the command of a process that failed
    script.write_text(TALK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "--no-python"]
    ran = subprocess.run([*launch, sys.executable, script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "AssertionError" not in ran.stderr
    assert ran.stderr.count("only one says this") == 1
    assert (ran.stderr.count("mapet: process 1 cannot"), ran.stderr.count("process 2 cannot")) == (1, 0)
