"""Batches arrive unchanged although a worker's buffers are reused."""

import multiprocessing
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapet.shared.runtime import shared_memory
from mapet.shared.runtime.loader import batches
from mapet.shared.runtime.shared_memory import SharedBuffers

LONGEST = 40


def load(numbers: Sequence[int]) -> dict:
    """Batches of three kinds, one of them larger, with different memory formats and a value that is not a tensor."""
    count = 3 if numbers[0] % 7 else 5
    pixels = torch.full((count, 3, 8, 8), numbers[0] % 251, dtype=torch.uint8)
    pixels = pixels.to(memory_format=torch.channels_last if numbers[0] % 3 else torch.contiguous_format)
    return {"pixels": pixels, "number": torch.tensor(numbers), "name": f"batch {numbers[0]}"}


@pytest.mark.parametrize("workers", [1, 3])
def test_all_batches_arrive_and_stay_unchanged(workers: int):
    expected = [load([number]) for number in range(LONGEST)]
    received = list(batches(load, [[number] for number in range(LONGEST)], workers))  # all of them stay in memory
    for batch, original in zip(received, expected, strict=True):
        assert batch["name"] == original["name"]
        for name in ("pixels", "number"):
            assert torch.equal(batch[name], original[name])
            assert (batch[name].dtype, batch[name].stride()) == (original[name].dtype, original[name].stride())


def test_a_reader_that_stops_early_keeps_no_memory_and_no_files():
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(3):
        loaded = batches(load, [[number] for number in range(LONGEST)], 2)
        assert next(loaded)["name"] == "batch 0"
        loaded.close()
        assert not shared_memory._buffers_of_workers
    if before:
        # PyTorch's queues may keep a few open; buffers would be 15.
        assert len(list(Path("/proc/self/fd").iterdir())) - before < 10
    assert not multiprocessing.active_children()


def test_too_little_shared_memory_is_an_error_of_one_sentence(tmp_path: Path):
    """As in a container, /dev/shm has two megabytes for the workers."""
    script = tmp_path / "load.py"
    script.write_text(
        "import torch\n"
        "from mapet.shared.errors import DataError\n"
        "from mapet.shared.runtime.loader import batches\n"
        "load = lambda numbers: {'pixels': torch.zeros(1_000_000, dtype=torch.uint8)}\n"
        "try:\n"
        "    list(batches(load, [[number] for number in range(9)], 1))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    mount = "mount -t tmpfs -o size=2m none /dev/shm"
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("mounting a small /dev/shm is not allowed here")
    command = ["unshare", "-m", "sh", "-c", f"{mount} && exec {sys.executable} {script}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    # A PyTorch that does not reserve shared memory loses the worker instead, and with it the size.
    assert re.match(
        r"There is no room in /dev/shm for another batch( \(1 MB\))? of a loader worker; allow more", done.stdout
    )
    assert "Traceback" not in done.stderr


DTYPES = [torch.uint8, torch.bool, torch.int64, torch.float32, torch.bfloat16]


@settings(deadline=None)
@given(data=st.data(), count=st.integers(1, 3))
def test_any_tensors_leave_a_buffer_unchanged(data, count: int):
    buffers = SharedBuffers(count)
    try:
        for _ in range(4):
            batch = {}
            for name in data.draw(st.sets(st.sampled_from("abcd"))):
                shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
                tensor = (torch.randn(*shape, 6) * 50).to(data.draw(st.sampled_from(DTYPES)))
                layouts = {
                    "contiguous": tensor,
                    "with gaps": tensor[..., ::2],
                    "transposed": tensor.movedim(-1, 0),
                    "repeated": tensor[..., :1].expand(*shape, 3),
                    "scalar": tensor.new_ones(()),
                }
                batch[name] = layouts[data.draw(st.sampled_from(sorted(layouts)))]
            taken = buffers.to_shared_memory(batch).take()
            assert set(taken) == set(batch)
            assert all(torch.equal(taken[name], batch[name]) for name in batch)
            assert all(taken[name].dtype == batch[name].dtype for name in batch)
    finally:
        shared_memory._buffers_of_workers.clear()
