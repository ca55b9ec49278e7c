"""One writer at a time: waiting, refusing, and what is left of a lock."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mapet.shared.errors import DataError, UsageError
from mapet.shared.storage import lock
from mapet.shared.storage.lock import sole_writer
from upath import UPath

HOLD = """
import sys, time
from pathlib import Path
from mapet.shared.storage.lock import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_LONGEST_WAIT", 0.3)


def hold(out: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_another_process_is_named_and_its_death_releases_the_lock(tmp_path: Path, impatient: None):
    other = hold(tmp_path / "out")
    try:
        with pytest.raises(UsageError) as caught, sole_writer(tmp_path / "out"):
            pass
    finally:
        other.kill()
        other.wait()
    stated = json.loads((tmp_path / ".out.lock.json").read_text())
    assert str(caught.value) == (
        f"Another process is writing to {tmp_path / 'out'} (mapet, process {other.pid} on {os.uname().nodename}, since "
        f"{stated['since']}); wait until it ends or choose another --out."
    )
    with sole_writer(tmp_path / "out"):
        assert json.loads((tmp_path / ".out.lock.json").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_the_second_waits_says_so_once_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    order = []
    held = threading.Event()

    def first() -> None:
        with sole_writer(tmp_path / "out"):
            held.set()
            time.sleep(0.5)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with caplog.at_level("INFO", "mapet"), sole_writer(tmp_path / "out"):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert [record.message.startswith("Waiting up to a minute, as another") for record in caplog.records] == [True]


@pytest.mark.parametrize("same", ["out/", "link", "x/../out"])
def test_other_spellings_of_a_folder_have_the_same_lock(tmp_path: Path, impatient: None, same: str):
    for name in ("out", "x"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with sole_writer(tmp_path / "out"), pytest.raises(UsageError), sole_writer(Path(f"{tmp_path}/{same}")):
        pass


def test_a_url_is_locked_on_this_machine(impatient: None):
    with sole_writer(UPath("memory://a/out")):
        with pytest.raises(UsageError, match="is writing to memory://a/out"), sole_writer(UPath("memory://a/out")):
            pass
        with sole_writer(UPath("memory://a/other")):
            pass


def test_a_command_that_writes_nothing_leaves_no_new_folders(tmp_path: Path):
    with pytest.raises(KeyError), sole_writer(tmp_path / "new" / "deep" / "out"):
        raise KeyError
    assert not (tmp_path / "new").exists()
    with sole_writer(tmp_path / "new" / "deep" / "out"):
        (tmp_path / "new" / "deep" / "out").mkdir()
    assert sorted(os.listdir(tmp_path / "new" / "deep")) == ["out"]


def test_a_damaged_or_hostile_note_about_the_holder_is_left_out(tmp_path: Path, impatient: None):
    with sole_writer(tmp_path / "out"):
        for note in ('{"pid": 1}', "[" * 10_000, json.dumps({"command": "\x1b[2J", "host": "", "pid": 1, "since": ""})):
            (tmp_path / ".out.lock.json").write_text(note)
            with pytest.raises(UsageError, match=r"is writing to \S*out; wait"), sole_writer(tmp_path / "out"):
                pass


def test_a_rank_that_outlives_its_torchrun_keeps_the_next_one_waiting(tmp_path: Path, impatient: None):
    class Rank:
        def __init__(self, rank: int):
            self.rank = rank

        def on_rank_zero(self, compute):
            return compute() if self.rank == 0 else None

    with (
        sole_writer(tmp_path / "out", Rank(1)),
        pytest.raises(UsageError, match="Another process is writing"),
        sole_writer(tmp_path / "out", Rank(0)),
    ):
        pass
    with sole_writer(tmp_path / "out", Rank(0)), sole_writer(tmp_path / "out", Rank(1)):
        pass
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_exist_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"out could not be written .*; choose another place and"):  # noqa: SIM117
        with sole_writer(tmp_path / "file" / "out"):
            pass


def test_a_folder_whose_parent_is_read_only_is_locked_inside(tmp_path: Path, run_as_owner):
    (tmp_path / "parent" / "out").mkdir(parents=True)
    (tmp_path / "parent").chmod(0o555)
    code = "from pathlib import Path; import os, sys; from mapet.shared.storage.lock import sole_writer\n"
    code += "with sole_writer(Path(sys.argv[1])): print(os.listdir(sys.argv[1]))"
    ran = run_as_owner(code, tmp_path / "parent" / "out")
    (tmp_path / "parent").chmod(0o755)
    assert ran.returncode == 0, ran.stderr
    assert "..lock" in ran.stdout


COUNT = """
import sys, time
from pathlib import Path
from mapet.shared.storage.lock import sole_writer
counter = Path(sys.argv[1], "counter")
for _ in range(40):
    with sole_writer(Path(sys.argv[1], "out")):
        number = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(number + 1))
"""


def test_processes_that_take_turns_never_hold_the_lock_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each holder deletes the lock's file, which must not give two processes a lock."""
    (tmp_path / "counter").write_text("0")
    turns = [subprocess.Popen([sys.executable, "-c", COUNT, tmp_path], stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait() for process in turns] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "120"
